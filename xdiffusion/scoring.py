"""The scores of a model on a data set: prompt accuracy, Frechet distance, background, and all that `Depth` adds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import ensure_writable, save_safetensors
from xdiffusion.data.image_set import ImageSet, invert, to_uint8, to_unit_range
from xdiffusion.evaluation.background import background_brightness, background_mask
from xdiffusion.evaluation.bootstrap import interval
from xdiffusion.evaluation.clip_score import clip_score
from xdiffusion.evaluation.diversity import diversity
from xdiffusion.evaluation.frechet import frechet_distance
from xdiffusion.evaluation.gap import fixed_draws
from xdiffusion.evaluation.judge import Judge, accuracy, judge_features, train_judge
from xdiffusion.evaluation.loss_curve import LossCurve
from xdiffusion.evaluation.memorisation import Nearest, nearest
from xdiffusion.evaluation.overlap import NEIGHBOURS
from xdiffusion.evaluation.scores import Features, frechet_scores, mean_scores, memorisation_scores, overlap_scores
from xdiffusion.held_out import CURVE_PAIRS, WithoutLoRA, bound_scores, gap_scores, held_out_of, loss_curves
from xdiffusion.lora.adapters import lora_disabled
from xdiffusion.model import DiffusionModel, generate, generators_for

BLOCK = 128
FLOOR_DRAWS = 10
NEAREST_BLOCK = 8192
SUSPECTS = 12
REASONS = {  # why a score of a set with classes may be None
    "gap_closed": "is for a LoRA on an inverted set",
    "background": "no pixel is dark in 99% of the images",
    "bits_per_dim": "is for discrete steps in pixel space",
}


@dataclass(frozen=True)
class Depth:
    """How much is computed beside the plain scores.

    resamples: of the bootstrap intervals; 0 leaves all intervals out.
    full: the scores of `full_scores` too.
    clip: two towers with `image_features` and `text_features` (see `clip_towers`), for a CLIP score.
    """

    resamples: int = 0
    full: bool = False
    clip: Any = None


class Samples(NamedTuple):
    """images: as drawn, in [-1, 1]; labels, prompts: what was asked for; seconds: of the drawing.

    real: as many training images to compare with, or all where there are fewer; generator: goes on from the draws above.
    """

    images: Float[Tensor, "N C H W"]
    labels: Int[Tensor, " N"]
    prompts: list[str]
    seconds: float
    real: Int[Tensor, " R"]
    generator: torch.Generator


class Suspect(NamedTuple):
    """A sample, its prompt, and the training images nearest to it with their distances."""

    image: Float[Tensor, "C H W"]
    prompt: str
    near: Float[Tensor, "k C H W"]
    distance: list[float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and what a report shows of it.

    scores: ready for JSON, None where there is no such score. reasons: why there is none, by its name.
    about: what the samples were compared with, in sentences.
    images, prompts: samples from the first on. columns: what a report writes above the columns of their grid, if anything.
    suspects: the samples that come closest to `nearest_to`, the nearest first. curves: losses by log-SNR.
    """

    scores: dict[str, Any]
    images: Float[Tensor, "N C H W"]
    prompts: list[str]
    reasons: dict[str, str] = field(default_factory=dict)
    about: str = ""
    columns: tuple[str, ...] = ()
    suspects: list[Suspect] = field(default_factory=list)
    nearest_to: str = "the training images"
    curves: dict[str, LossCurve] = field(default_factory=dict)


def score(
    model: DiffusionModel,
    data: ImageSet,
    sampling: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int,
    has_lora: bool,
    judge_folder: Path,
    depth: Depth = Depth(),
    without_lora: WithoutLoRA = lora_disabled,
) -> Evaluation:
    """All scores. For an inverted set the judge sees the samples un-inverted.

    Args:
        model: in evaluation mode, with its LoRA on if it has one.
        data: what to compare with.
        sampling: keyword arguments of `generate`.
        num_samples: spread evenly over the classes; at least 2, for a full depth two of each class.
        seed: of the noise, the prompts' wording, the real images of the floor, and the intervals.
        has_lora: whether gap_closed is asked for; it needs an inverted set.
        judge_folder: where judges are kept.
        depth: what to compute beside the plain scores.
        without_lora: `without_lora(model)` is a block in which the LoRA is off.

    Raises:
        ValueError: see `check_set_fits`; if samples or losses are not finite.
    """
    check_set_fits(model, data, num_samples, depth.full)
    normal = invert(data) if data.inverted else data
    judge, judge_accuracy = cached_judge(normal, judge_folder)
    samples = draw_samples(model, data, sampling, num_samples, seed)
    scores = image_scores(samples, data, normal, judge, depth.resamples, seed)
    gap = gap_scores(model, data, normal, depth.resamples, seed, without_lora) if has_lora and data.inverted else {}
    scores |= {"gap_closed": None} | gap
    scores |= {
        "seconds_per_image": samples.seconds / num_samples,
        "judge_accuracy": judge_accuracy,
        "dataset": data.name,
        "num_samples": num_samples,
        "real_images": len(samples.real),
        "seed": seed,
    }
    suspects, curves = [], {}
    if depth.full:
        more, neighbours = full_scores(samples, data, normal, judge, depth, seed)
        draws = fixed_draws(len(data.test), model.latent_shape, CURVE_PAIRS)
        of_base = {"normal": held_out_of(normal) if data.inverted else None}
        of_base |= {"without_lora": without_lora if has_lora else None}
        groups = data.test.groups[draws.index]
        curves = loss_curves(model, held_out_of(data), draws, groups, depth.resamples, **of_base)
        scores |= more | bound_scores(model, data, depth.resamples, seed)
        scores["loss_curve"] = {name: curve._asdict() for name, curve in curves.items()}
        seen = as_the_judge_sees(samples.images, data)
        suspects = suspects_of(samples.prompts, neighbours, seen.__getitem__, normal.train.floats)
    scores, reasons = finished(scores, REASONS)
    about = f"Compared with the held-out images of {normal.name}."
    about += " The judge sees the samples un-inverted, and they are beside their nearest images so." * data.inverted
    columns = tuple(names[0] for names in data.prompts.names)
    return Evaluation(scores, samples.images, samples.prompts, reasons, about, columns, suspects, curves=curves)


def check_set_fits(model: DiffusionModel, data: ImageSet, num_samples: int, full: bool) -> None:
    """Raise ValueError for too few samples or held-out images, or a data set of another image shape than the model's."""
    fewest = max(NEIGHBOURS + 1, 2 * data.prompts.num_classes) if full else 2
    if num_samples < fewest:
        needs = "neighbours and two of each class need" if full else "a Frechet distance needs"
        raise ValueError(f"--num_samples {num_samples}: {needs} at least {fewest} samples")
    shape = tuple(data.train.images.shape[1:])
    if shape != model.image_shape:
        raise ValueError(f"{data.name} has images {shape}, the model makes {model.image_shape}")
    if not full:
        return
    for which, split in {"held-out": data.test, "training": data.train}.items():
        number, of_one_class = len(split), int(split.labels.bincount().max())
        if number <= NEIGHBOURS or of_one_class < 2:
            raise ValueError(
                f"{data.name} has {number} {which} images, of one class at most {of_one_class}: scores with --full need at "
                f"least {NEIGHBOURS + 1}, and two of a class"
            )


def draw_samples(model: DiffusionModel, data: ImageSet, sampling: Mapping[str, Any], num_samples: int, seed: int) -> Samples:
    """Samples of every class in turn, in a wording drawn for each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % data.prompts.num_classes
    prompts = data.prompts.choose(labels, torch.rand(num_samples, generator=generator))
    started = time.perf_counter()
    images = generate(model, prompts, generators_for(seed, num_samples), **sampling)
    seconds = time.perf_counter() - started
    real = torch.randperm(len(data.train), generator=generator)[:num_samples]
    return Samples(images, labels, prompts, seconds, real, generator)


# --- scores of the samples ---


def image_scores(samples: Samples, data: ImageSet, normal: ImageSet, judge: Judge, resamples: int, seed: int) -> dict[str, Any]:
    """Prompt accuracy, background and Frechet distance, with intervals where resamples are asked for."""
    features = judge_features(judge, as_the_judge_sees(samples.images, data))
    held_out = judge_features(judge, normal.test.floats())
    rows = {"prompt_accuracy": (judge.head(features).argmax(1) == samples.labels).float()}
    mask = background_mask(normal.train.images)
    if mask.any():
        rows["background"] = background_brightness(samples.images, mask)
    scores = {"background": None} | mean_scores(rows, resamples, seed)
    compared = Features(features, held_out, None, normal.test.groups)
    scores |= frechet_scores(compared, resamples, seed, samples.labels)
    scores |= floor_scores(samples.labels, normal, judge, held_out, seed)
    return scores | ({"resamples": resamples} if resamples else {})


def floor_scores(
    labels: Int[Tensor, " N"], data: ImageSet, judge: Judge, held_out: Float[Tensor, "M D"], seed: int
) -> dict[str, float]:
    """The Frechet distance of as many training images as samples, the mean of some draws: one alone is off by a seventh.

    frechet_floor: of any of them. frechet_floor_balanced: of as many of each class as the samples have, in their features
    the larger part of what is between two sets of real images.
    """
    generator, train = torch.Generator().manual_seed(seed), data.train
    counts = labels.bincount(minlength=data.prompts.num_classes).tolist()

    def shuffled() -> Tensor:
        return torch.randperm(len(train), generator=generator)

    def balanced(order: Tensor) -> Tensor:
        return torch.cat([order[train.labels[order] == c][:count] for c, count in enumerate(counts)])

    draws = {
        "frechet_floor": [shuffled()[: len(labels)] for _ in range(FLOOR_DRAWS)],
        "frechet_floor_balanced": [balanced(shuffled()) for _ in range(FLOOR_DRAWS)],
    }
    used = torch.cat([index for drawn in draws.values() for index in drawn]).unique()
    features = torch.cat([judge_features(judge, train.floats(index)) for index in used.split(NEAREST_BLOCK)])
    return {
        name: sum(frechet_distance(features[torch.searchsorted(used, index)], held_out) for index in drawn) / FLOOR_DRAWS
        for name, drawn in draws.items()
    }


def full_scores(
    samples: Samples, data: ImageSet, normal: ImageSet, judge: Judge, depth: Depth, seed: int
) -> tuple[dict[str, Any], Nearest]:
    """Overlap, memorisation, diversity and CLIP score beside as many held-out images; `_real` is of training images."""
    count = len(samples.labels)
    held_out = torch.randperm(len(normal.test), generator=samples.generator)[:count]
    seen, test = as_the_judge_sees(samples.images, data), normal.test.floats(held_out)
    features, real, known = (judge_features(judge, x) for x in (seen, test, normal.train.floats(samples.real)))
    groups = normal.test.groups[held_out]
    labels, real_labels, known_labels = samples.labels, normal.test.labels[held_out], normal.train.labels[samples.real]
    train = (to_unit_range(block) for block in normal.train.images.split(NEAREST_BLOCK))
    found = nearest(torch.cat([seen, test]), train)
    neighbours, drawn = found.rows(0, count), {"resamples": depth.resamples, "seed": seed}
    scores = overlap_scores(Features(features, real, known, groups), **drawn)
    scores |= memorisation_scores(neighbours, found.rows(count), groups=groups, **drawn)
    if depth.clip is not None:
        scores |= mean_scores({"clip_score": clip_rows(depth.clip, seen, samples.prompts)}, **drawn)
        prompts = data.prompts.choose(real_labels, torch.rand(len(real_labels), generator=samples.generator))
        scores["clip_score_real"] = float(clip_rows(depth.clip, test, prompts).mean())

    def diversity_of(index: Tensor) -> float:
        return diversity(features[index], labels[index], real, real_labels)

    scores["diversity"] = diversity_of(torch.arange(count))
    scores["diversity_real"] = diversity(known, known_labels, real, real_labels)
    if depth.resamples:
        scores["diversity_interval"] = interval(diversity_of, torch.arange(count), centred=True, **drawn)
    return scores, neighbours


def as_the_judge_sees(images: Float[Tensor, "N C H W"], data: ImageSet) -> Float[Tensor, "N C H W"]:
    """What a saved picture would hold, un-inverted."""
    return to_unit_range(to_uint8(-images if data.inverted else images))


@torch.no_grad()
def clip_rows(clip: Any, images: Float[Tensor, "N C H W"], prompts: list[str]) -> Float[Tensor, " N"]:
    """The CLIP score of each image and its prompt, in blocks."""
    starts = range(0, len(prompts), BLOCK)
    blocks = [(images[i : i + BLOCK], prompts[i : i + BLOCK]) for i in starts]
    return torch.cat([clip_score(clip.image_features(x), clip.text_features(p)) for x, p in blocks])


def suspects_of(
    prompts: Sequence[str],
    neighbours: Nearest,
    samples: Callable[[Tensor], Tensor],
    training: Callable[[Tensor], Tensor],
) -> list[Suspect]:
    """The SUSPECTS samples that are nearest to a training image; both callables give images by index."""
    distance, index = neighbours
    chosen = distance[:, 0].argsort()[:SUSPECTS]
    return [
        Suspect(image, prompts[i], training(index[i]), distance[i].tolist())
        for image, i in zip(samples(chosen), chosen.tolist())
    ]


def cached_judge(images: ImageSet, folder: Path) -> tuple[Judge, float]:
    """The judge of a data set and its held-out accuracy, trained on the first call and kept in `folder`.

    The file's name holds a hash of the training split: another copy of the data has another judge. The accuracy is measured
    on each call, for another held-out split has another one.

    Raises:
        CheckpointError: if the file that is kept is damaged, or the folder cannot be written to.
    """
    fingerprint = content_hash({"images": images.train.images, "labels": images.train.labels})[:12]
    path = folder / images.name / f"judge_{images.image_size}px_{fingerprint}.safetensors"
    if path.is_file():
        tensors, _ = load_safetensors(path)
        judge = Judge(images.channels, images.image_size, images.prompts.num_classes)
        judge = judge.to(memory_format=torch.channels_last)  # as it was trained: the same scores to the last digit
        try:
            judge.load_state_dict(tensors)
        except RuntimeError as error:
            reason = shorten(str(error), 200, placeholder="...")
            raise CheckpointError(f"{path} is no judge ({reason}); without it, one is trained") from error
        judge.eval().requires_grad_(False)
    else:
        ensure_writable(path.parent)
        judge = train_judge(images.train.floats, images.train.labels, images.prompts.num_classes)
        save_safetensors(path, judge.state_dict(), {"dataset": images.name})
    return judge, accuracy(judge, images.test.floats(), images.test.labels)


def finished(scores: Mapping[str, Any], reasons: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The scores, rounded, with None for what is no finite number, and the reasons of those that are None."""
    numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in scores.items()}  # and intervals
    broken = {n for n, values in numbers.items() if any(isinstance(v, float) and not math.isfinite(v) for v in values)}
    why = {name: "came out as no finite number" if name in broken else reasons[name] for name in [*reasons, *broken]}
    values = {name: None if name in broken else value for name, value in scores.items()}
    return _rounded(values), {name: why[name] for name, value in values.items() if value is None}


def _rounded(value: Any) -> Any:
    """Floats to five places, wherever they stand."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value
