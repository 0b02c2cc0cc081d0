"""The scores of a model on a data set: prompt accuracy, Frechet distance, background, and a LoRA's gap_closed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xdiffusion.checkpoints.files import content_hash, load_safetensors, save_safetensors
from xdiffusion.data.image_set import ImageSet, invert, to_uint8, to_unit_range
from xdiffusion.diffusion.objective import squared_error
from xdiffusion.evaluation.background import background_brightness, background_mask
from xdiffusion.evaluation.frechet import frechet_distance
from xdiffusion.evaluation.gap import fixed_draws, gap_closed
from xdiffusion.evaluation.judge import Judge, accuracy, judge_features, train_judge
from xdiffusion.lora.adapters import lora_disabled
from xdiffusion.model import DiffusionModel, generate, generators_for


def score(
    model: DiffusionModel,
    data: ImageSet,
    sampling: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int,
    has_lora: bool,
    judge_folder: Path,
) -> dict[str, Any]:
    """All scores, ready for JSON. For an inverted set the judge sees the samples un-inverted.

    Args:
        model: in evaluation mode, with its LoRA on if it has one.
        data: what to compare with.
        sampling: keyword arguments of `generate`.
        num_samples: spread evenly over the classes; at least 2.
        seed: of the noise, the prompts' wording, and the real images of the floor.
        has_lora: whether gap_closed is asked for; it needs an inverted set.
        judge_folder: where judges are kept.

    Raises:
        ValueError: for fewer than 2 samples, or a data set of another image shape than the model's.
    """
    if num_samples < 2:
        raise ValueError(f"--num_samples {num_samples}: a Frechet distance needs at least 2 samples")
    if tuple(data.train.images.shape[1:]) != model.image_shape:
        raise ValueError(
            f"{data.name} has images {tuple(data.train.images.shape[1:])}, the model makes {model.image_shape}"
        )
    normal = invert(data) if data.inverted else data
    judge, judge_accuracy = cached_judge(normal, judge_folder)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % data.prompts.num_classes
    prompts = data.prompts.choose(labels, torch.rand(num_samples, generator=generator))

    started = time.perf_counter()
    samples = generate(model, prompts, generators_for(seed, num_samples), **sampling)
    seconds = time.perf_counter() - started

    seen = to_unit_range(to_uint8(-samples if data.inverted else samples))  # what a saved picture would hold
    features = judge_features(judge, seen)
    held_out = judge_features(judge, normal.test.floats())
    real = torch.randperm(len(normal.train), generator=generator)[:num_samples]
    scores = {
        "prompt_accuracy": float((judge.head(features).argmax(1) == labels).float().mean()),
        "frechet_distance": frechet_distance(features, held_out),
        "frechet_floor": frechet_distance(judge_features(judge, normal.train.floats(real)), held_out),
        "background": background_brightness(samples, background_mask(normal.train.images)),
        "gap_closed": loss_gap(model, data, normal) if has_lora and data.inverted else None,
        "seconds_per_image": seconds / num_samples,
        "judge_accuracy": judge_accuracy,
        "dataset": data.name,
        "num_samples": num_samples,
        "seed": seed,
    }
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in scores.items()}


def cached_judge(images: ImageSet, folder: Path) -> tuple[Judge, float]:
    """The judge of a data set and its held-out accuracy, trained on the first call and kept in `folder`.

    The file's name holds a hash of the training split: another copy of the data has another judge.
    """
    fingerprint = content_hash({"images": images.train.images, "labels": images.train.labels})[:12]
    path = folder / images.name / f"judge_{images.image_size}px_{fingerprint}.safetensors"
    if path.is_file():
        tensors, metadata = load_safetensors(path)
        judge = Judge(images.channels, images.image_size, images.prompts.num_classes)
        judge = judge.to(memory_format=torch.channels_last)  # as it was trained: the same scores to the last digit
        judge.load_state_dict(tensors)
        return judge.eval().requires_grad_(False), float(metadata["accuracy"])
    judge = train_judge(images.train.images, images.train.labels, images.prompts.num_classes)
    held_out = accuracy(judge, images.test.floats(), images.test.labels)
    save_safetensors(path, judge.state_dict(), {"accuracy": f"{held_out:.5f}", "dataset": images.name})
    return judge, held_out


def loss_gap(model: DiffusionModel, data: ImageSet, normal: ImageSet) -> float:
    """`gap_closed` of the model's LoRA on the held-out images of an inverted set and of its normal twin."""
    draws = fixed_draws(len(data.test), model.latent_shape)
    captions = [data.prompts.captions[label][0] for label in data.test.labels[draws.index].tolist()]

    @torch.no_grad()
    def mean_loss(images: ImageSet) -> float:
        context = model.text_encoder.encode(captions)  # a LoRA may be in the text encoder too
        x0 = model.autoencoder.encode(images.test.floats(draws.index).to(model.device))
        blocks = zip(*(a.to(model.device).split(128) for a in (x0, draws.eps, draws.t, context)))
        errors = [squared_error(model.network, model.schedule, model.prediction, *block) for block in blocks]
        return float(torch.cat(errors).mean())

    lora_inverted = mean_loss(data)
    with lora_disabled(model):
        base_inverted, base = mean_loss(data), mean_loss(normal)
    return gap_closed(base, base_inverted, lora_inverted)
