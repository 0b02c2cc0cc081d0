"""The scores of a model on captioned pictures without classes, as runs of Stable Diffusion have them.

There is no judge of such pictures. Frechet distance, overlap and diversity are taken on the features of a published CLIP's
vision tower where one is given, which also says how well samples fit their captions; else diversity is one of pixels. What
compares pixels does so at SIDE x SIDE. Of full-sized pictures no more than a batch is held at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from xdiffusion.data.captioned_images import CaptionedImages, Crop
from xdiffusion.data.image_set import to_uint8, to_unit_range
from xdiffusion.evaluation.bootstrap import interval
from xdiffusion.evaluation.clip_score import clip_score
from xdiffusion.evaluation.diversity import mean_distance
from xdiffusion.evaluation.gap import fixed_draws
from xdiffusion.evaluation.loss_curve import LossCurve
from xdiffusion.evaluation.memorisation import Nearest, nearest
from xdiffusion.evaluation.overlap import NEIGHBOURS, Overlap
from xdiffusion.evaluation.scores import Features, frechet_scores, mean_scores, memorisation_scores, overlap_scores
from xdiffusion.held_out import loss_curves
from xdiffusion.lora.adapters import lora_disabled
from xdiffusion.model import DiffusionModel, generate, generators_for, of_captions
from xdiffusion.scoring import Depth, Evaluation, finished, suspects_of

SIDE = 64
SHOWN, SHOWN_SIDE = 24, 128  # of a report's pictures
PAIRS = 256  # of (picture, noise, time) for the loss curve
NO_CLASSES = "needs a judge, and the pictures have no classes"
NO_FEATURES = "needs features: name a published CLIP with --clip MODEL/TAG"
NO_HELD_OUT = "needs the pictures that the model was trained on, --training_data_dir, and others to compare with, --data_dir"
REASONS = dict.fromkeys(("prompt_accuracy", "judge_accuracy"), NO_CLASSES) | {
    **dict.fromkeys(("clip_score", "frechet_distance"), NO_FEATURES),
    **dict.fromkeys(Overlap._fields, f"{NO_FEATURES}, and more than {NEIGHBOURS} samples and pictures"),
    **dict.fromkeys(("data_copying", "nearest_distance_real"), NO_HELD_OUT),
    "frechet_floor": f"{NO_HELD_OUT}, and --clip MODEL/TAG",
    "copies": "needs two training pictures",
    "background": "is for sets with an empty background",
    "gap_closed": "is for a LoRA on an inverted set",
    "bits_per_dim": "is for sets with classes, in pixel space",
    "loss_curve": "comes with --full",
    "diversity": "needs two pictures to compare with",
    "pictures_trained_on": "--training_data_dir names the pictures that the model was trained on",
}


@dataclass(frozen=True)
class Cut:
    """Pictures by index, each scaled and cut to `size` (height, width), with its first caption."""

    pictures: CaptionedImages
    size: tuple[int, int]
    at_once: int

    def __call__(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 3 H W"], list[str]]:
        loaded = [self.pictures.load(i, Crop(), self.size) for i in index.tolist()]
        images = to_unit_range(torch.stack([image for _, image in loaded]))
        return images, [self.pictures.captions[i][0] for i, _ in loaded]  # a damaged one is replaced by another

    def batches(self, index: Int[Tensor, " N"]) -> Iterator[tuple[Tensor, list[str]]]:
        """at_once of them at a time."""
        return map(self, index.split(self.at_once))


class Seen(NamedTuple):
    """What is kept of pictures.

    small: at SIDE x SIDE. fit: CLIP scores with their captions. views: at SHOWN_SIDE. seconds: of drawing or reading.
    """

    small: Float[Tensor, "N 3 h w"]
    features: Float[Tensor, "N E"] | None
    fit: Float[Tensor, " N"] | None
    views: UInt8[Tensor, "N 3 H W"]
    seconds: float


def score_captioned(
    model: DiffusionModel,
    given: CaptionedImages,
    training: CaptionedImages | None,
    sampling: Mapping[str, Any],
    *,
    num_samples: int,
    seed: int,
    has_lora: bool,
    depth: Depth,
) -> Evaluation:
    """All scores that pictures without classes can have; samples are drawn for their captions in turn.

    Args:
        model: in evaluation mode, with its LoRA on if it has one.
        given: the pictures to compare with, each scaled and cut to the model's size.
        training: those that the model was trained on; None where they are not known.
        sampling: keyword arguments of `generate`, batch_size among them; captions are taken as they stand.
        num_samples: at least 2.
        seed: of the noise, the choice of captions and pictures, and the intervals.
        has_lora: whether loss curves are to be had without it too.
        depth: `full` adds the loss curves; `clip` is a published CLIP's two towers.

    Raises:
        ValueError: for a single sample, or a model whose images are not in colour.
    """
    if num_samples < 2:
        raise ValueError(f"--num_samples {num_samples}: a distance between samples needs at least 2")
    if model.image_shape[0] != given.channels:
        raise ValueError(f"{given.name} has pictures in colour, the model makes images {model.image_shape}")
    given_cut, training_cut = (p and Cut(p, model.image_shape[1:], sampling["batch_size"]) for p in (given, training))
    compared, shared = training_cut or given_cut, trained_on(given, training)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(given), generator=generator)
    asked = order.repeat(-(-num_samples // len(order)))[:num_samples]
    prompts = given.captions_of(asked.tolist(), torch.rand(num_samples, generator=generator))
    samples = seen(drawn(model, prompts, seed, sampling), depth.clip)
    real = seen(given_cut.batches(order[:num_samples]), depth.clip)

    scores: dict[str, Any] = dict.fromkeys(REASONS) | {"seconds_per_image": samples.seconds / num_samples}
    if depth.clip is not None:
        chosen = torch.randperm(len(compared.pictures), generator=generator)[:num_samples]
        known = seen(compared.batches(chosen), depth.clip) if shared == 0 else None
        scores |= {"real_images": len(chosen)} if known else {}
        scores |= clip_scores(samples, real, known, depth.resamples, seed)
    scores |= diversity_scores(samples, real, depth.resamples, seed)
    more, neighbours = copy_scores(samples, real if shared == 0 else None, compared, depth.resamples)
    curves = curves_of(model, given_cut, depth.resamples, has_lora) if depth.full else {}
    scores |= more | {"loss_curve": {name: curve._asdict() for name, curve in curves.items()} or None}
    scores |= {"resamples": depth.resamples} if depth.resamples else {}
    scores |= {"dataset": given.name, "pictures": len(given), "pictures_trained_on": shared}
    values, reasons = finished(scores | {"num_samples": num_samples, "seed": seed}, REASONS)
    shown = to_unit_range(samples.views[:SHOWN])
    views = [lambda i: to_unit_range(samples.views[i]), lambda i: reduced(compared(i)[0], SHOWN_SIDE)]
    suspects = suspects_of(prompts, neighbours, *views)
    near = "the training pictures" if training else "the pictures of the folder"
    return Evaluation(values, shown, prompts[:SHOWN], reasons, about(given, shared), (), suspects, near, curves)


def about(given: CaptionedImages, shared: int | None) -> str:
    """What the pictures are to the model, plainly."""
    if shared is None:
        what = "Whether the model was trained on them is not known"
    elif shared == len(given):
        what = "The model was trained on them: none is held out, and the loss is that of known pictures"
    elif shared:
        what = f"The model was trained on {shared} of them: they are not held out as a whole"
    else:
        what = "They are held out: the model was trained on none of them"
    return f"Compared with the {len(given)} pictures of {given.name}. {what}."


def trained_on(given: CaptionedImages, training: CaptionedImages | None) -> int | None:
    """How many of the given pictures are training pictures, to the byte; None where these are not known."""
    if training is None or training is given:
        return None if training is None else len(given)
    known = {picture.content_hash() for picture in training.pictures}
    return sum(picture.content_hash() in known for picture in given.pictures)


# --- scores ---


def clip_scores(samples: Seen, real: Seen, known: Seen | None, resamples: int, seed: int) -> dict[str, Any]:
    """CLIP score, Frechet distance and overlap; the `_real` ones and the floor are of `known` training pictures.

    Each where there are enough pictures for it.
    """
    scores = {"clip_score_real": float(real.fit.mean())} | mean_scores({"clip_score": samples.fit}, resamples, seed)
    features = Features(*(None if s is None or len(s.features) < 2 else s.features for s in (samples, real, known)))
    if features.held_out is not None:
        scores |= frechet_scores(features, resamples, seed) | overlap_scores(features, resamples, seed)
    return scores


def diversity_scores(samples: Seen, real: Seen, resamples: int, seed: int) -> dict[str, Any]:
    """The mean distance of two samples over that of two pictures, of features or of pixels."""
    if len(real.small) < 2:
        return {}
    of_samples, of_real = (
        torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # equal ones are at distance 0
        for points in (s.small.flatten(1) if s.features is None else s.features for s in (samples, real))
    )
    whole = mean_distance(of_real, torch.arange(len(of_real)))

    def diversity_of(index: Int[Tensor, " N"]) -> float:
        return mean_distance(of_samples, index) / whole if whole else math.nan

    everyone = torch.arange(len(of_samples))
    scores: dict[str, Any] = {"diversity": diversity_of(everyone)}
    if resamples:
        scores["diversity_interval"] = interval(diversity_of, everyone, centred=True, resamples=resamples, seed=seed)
    return scores


def copy_scores(samples: Seen, held_out: Seen | None, compared: Cut, resamples: int) -> tuple[dict[str, Any], Nearest]:
    """How near samples come to some pictures, beside how near held-out ones come."""
    count = len(samples.small)
    queries = samples.small if held_out is None else torch.cat([samples.small, held_out.small])
    everything = compared.batches(torch.arange(len(compared.pictures)))
    found = nearest(queries, (reduced(images, SIDE) for images, _ in everything))
    of_samples, of_held_out = found.rows(0, count), found.rows(count) if held_out is not None else None
    return memorisation_scores(of_samples, of_held_out, resamples, seed=0), of_samples


def curves_of(model: DiffusionModel, given: Cut, resamples: int, has_lora: bool) -> dict[str, LossCurve]:
    """The loss by log-SNR on PAIRS pictures and noises; of few pictures each comes with several noises."""
    count = len(given.pictures)
    draws = fixed_draws(max(count, PAIRS), model.latent_shape, PAIRS)
    draws = draws._replace(index=draws.index % count)
    return loss_curves(model, given, draws, draws.index, resamples, without_lora=lora_disabled if has_lora else None)


# --- pictures ---


def drawn(
    model: DiffusionModel, prompts: Sequence[str], seed: int, sampling: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """Samples as saved pictures would hold them, in batches with their prompts."""
    generators, captions, size = generators_for(seed, len(prompts)), of_captions(sampling), sampling["batch_size"]
    for i in tqdm(range(0, len(prompts), size), desc="samples", unit="batch", leave=False, disable=None):
        block = slice(i, i + size)
        images = generate(model, prompts[block], generators[block], **captions)
        yield to_unit_range(to_uint8(images)), prompts[block]


def seen(blocks: Iterable[tuple[Tensor, Sequence[str]]], clip: Any) -> Seen:
    """What is kept of pictures that come in batches, each with its caption."""
    small, features, fit, views, seconds = [], [], [], [], 0.0
    started = time.perf_counter()
    for images, captions in blocks:
        seconds += time.perf_counter() - started
        small.append(reduced(images, SIDE))
        if clip is not None:
            features.append(clip.image_features(images))
            fit.append(clip_score(features[-1], clip.text_features(list(captions))))
        views.append(to_uint8(reduced(images, SHOWN_SIDE)))
        started = time.perf_counter()
    of_clip = (torch.cat(features), torch.cat(fit)) if clip is not None else (None, None)
    return Seen(torch.cat(small), *of_clip, torch.cat(views), seconds)


def reduced(images: Float[Tensor, "N C H W"], side: int) -> Float[Tensor, "N C h w"]:
    """Scaled so that the longer side is `side`; smaller images as they are."""
    longest = max(images.shape[2:])
    if longest <= side:
        return images
    size = [max(1, round(n * side / longest)) for n in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
