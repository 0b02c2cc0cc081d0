"""What is seen at the start of a run of a diffusion model, before anything is loaded, drawn or cached.

torch is imported only with the pictures or for a learned word, so that a config's mistake is said at once.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

if TYPE_CHECKING:
    from xdiffusion.text_encoders.clip import CLIPTextEncoder
    from xdiffusion.training.batches import Data

OF_FILES = ("image/folder", "image/hugging_face")
SAMPLE_PROMPTS = "training.sample_prompts"


def check_together(config: DictConfig, *, lora: bool) -> None:
    """See that the sections of a resolved config go together, and that the objective is one; warn where it teaches little.

    Raises:
        ValueError: if not.
    """
    gamma = config.diffusion.min_snr_gamma
    if gamma is not None and not gamma > 0:
        raise ValueError(f"diffusion.min_snr_gamma={gamma} must be above 0, or null")
    if not math.isfinite(config.diffusion.offset_noise):
        raise ValueError(f"diffusion.offset_noise={config.diffusion.offset_noise} must be finite")
    batch_size, cache, data = config.training.batch_size, config.cache, config.data
    if "prior" in config and data.kind not in OF_FILES:
        raise ValueError(f"prior: is for {' and '.join(OF_FILES)}, not for {data.kind}")
    if "prior" in config and batch_size % 2:
        raise ValueError(f"training.batch_size={batch_size} must be even: class images are half of a batch (prior:)")
    for name in ("latents", "text_embeddings"):
        if cache[name] and data.kind not in OF_FILES:
            raise ValueError(f"cache.{name}=true is for {' and '.join(OF_FILES)}, not for {data.kind}")
    if cache.latents and data.random_crop:
        raise ValueError("cache.latents=true keeps one latent of each picture, so data.random_crop must be false")
    if cache.text_embeddings and ("textual_inversion" in config or (lora and "text_encoder_lora" in config)):
        raise ValueError(
            "cache.text_embeddings=true is for a frozen text encoder; this run trains it "
            "(text_encoder_lora or textual_inversion)"
        )
    captions = data.get("captions") or []
    if captions and not any(caption.strip() for caption in captions):
        raise ValueError(f"data.captions={list(captions)} are empty: null takes those of the pictures")
    if "prior" in config and config.prior.prompt in captions:
        raise ValueError(f"prior.prompt={config.prior.prompt!r} is in data.captions: class images have a prompt of their own")
    if "prior" in config and data.kind == "image/folder" and data.data_dir:
        check_outside(Path(config.prior.data_dir), Path(data.data_dir), "prior.data_dir, whose pictures are of the class,")
        check_outside(Path(data.data_dir), Path(config.prior.data_dir), "--data_dir, whose pictures are of the subject,")
    if "textual_inversion" in config and captions:
        _check_named(config.textual_inversion.token, captions, "data.captions")
    if gamma is not None and config.diffusion.schedule.get("zero_terminal_snr"):
        print(
            f"warning: diffusion.min_snr_gamma={gamma} gives the noisiest times, which zero_terminal_snr is for, next to no "
            "weight in the loss; null weighs all alike",
            file=sys.stderr,
        )


def check_outside(inner: Path, outer: Path, what: str) -> None:
    """See that a folder which a run reads or writes is not part of one whose pictures it learns from.

    Raises:
        ValueError: if it is that folder, or lies in it.
    """
    if inner.resolve().is_relative_to(outer.resolve()):
        raise ValueError(f"{inner} lies in {outer}: {what} would be learned with the pictures there; name a folder outside")


def check_captions(data: Data, config: DictConfig, context_length: int) -> None:
    """See that the captions of a data set can be learned from; print how many are cut.

    Of shards nothing is seen: to see all of their captions would be to read all of them.

    Args:
        context_length: of the text encoder, its start and end included.

    Raises:
        ValueError: if none names the word of `textual_inversion:`.
    """
    from xdiffusion.data.captioned_images import CaptionedImages
    from xdiffusion.data.shards import Shards
    from xdiffusion.text_encoders.tokenizer import token_ids

    if isinstance(data, Shards):
        return
    tables = data.captions if isinstance(data, CaptionedImages) else data.prompts.captions
    captions = dict.fromkeys(caption for captions in tables for caption in captions)
    if "textual_inversion" in config:
        token = config.textual_inversion.token
        if without := len(captions) - _check_named(token, captions, data.name, context_length - 2):
            print(f"captions: {without} of {len(captions)} do not name {token} where it is read, and teach it nothing")
    room = context_length - 2
    may_be_long = (caption for caption in captions if len(caption.encode()) > room)  # a token has a byte at least
    long = {caption: count for caption in may_be_long if (count := len(token_ids(caption))) > room}
    if long:
        longest = max(long, key=long.__getitem__)
        print(
            f"captions: {len(long)} of {len(captions)} have more than the {room} tokens that the text encoder reads, and "
            f"are cut there; the longest has {long[longest]}: {longest[:60]!r}..."
        )


def check_sample_prompts(prompts: Sequence[str], encoder: CLIPTextEncoder, config: DictConfig) -> None:
    """See that what sample grids are to draw can be read as it is written; tell what may be meant otherwise.

    Args:
        prompts: of `training.sample_prompts`, without slots; at least one.
        encoder: of the run, with the word that it learns; it may be without weights.

    Raises:
        ValueError: if one of them, or `sampling.negative_prompt` beside them, cannot.
    """
    from xdiffusion.data.captions import MAX_CAPTION

    syntax, room = config.sampling.prompt_syntax, encoder.context_length - 2
    for prompt in prompts:
        if len(prompt) > MAX_CAPTION:
            letters = f"{len(prompt):,} letters; allowed are {MAX_CAPTION:,}"
            raise ValueError(f"{SAMPLE_PROMPTS} {prompt[:60]!r}... has {letters}")
        if syntax == "plain" and (count := encoder.count_tokens(prompt)) > room:
            raise ValueError(
                f"{SAMPLE_PROMPTS} {prompt!r:.100} has {count} tokens, and the text encoder reads {room}: say it with fewer "
                "words, or set sampling.prompt_syntax=weighted, which reads prompts of any length"
            )
    negative = ("sampling.negative_prompt", config.sampling.negative_prompt)
    for place, prompt in [*((SAMPLE_PROMPTS, prompt) for prompt in prompts), negative]:
        try:
            encoder.chunks(prompt, syntax)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    remarks = encoder.remarks(prompts, syntax)
    if encoder.learned_ids and not any(encoder.learned_words_in(prompt, syntax) for prompt in prompts):
        words = ", ".join(encoder.learned_ids)
        remarks.append(f"warning: no prompt of {SAMPLE_PROMPTS} names {words}, which the sample grids then do not show")
    for remark in remarks:
        print(remark, file=sys.stderr)


def _check_named(token: str, captions: Iterable[str], where: str, room: float = math.inf) -> int:
    """How many captions hold the word where the text encoder, which reads `room` tokens, finds it; at least one has to."""
    from xdiffusion.text_encoders.clip import whole_word
    from xdiffusion.text_encoders.tokenizer import token_ids

    word = re.compile(whole_word(token.strip()), re.IGNORECASE)
    found = ((caption, word.search(caption)) for caption in captions)
    named = sum(1 for caption, place in found if place and len(token_ids(caption[: place.start()])) < room)
    if not named:
        within = f" within the {room} tokens that are read" if room < math.inf else ""
        raise ValueError(
            f"no caption of {where} names textual_inversion.token={token!r} as a word of its own{within}: "
            f"set captions for all pictures, such as data.captions=['a photo of {token}']"
        )
    return named
