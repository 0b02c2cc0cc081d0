"""Textual inversion ([TI] section 4.2): a new word whose embedding alone is learned, or is learned together with a LoRA.

v* = argmin_v E_{t, eps} [ || network(xt, time, context(v)) - target ||^2 ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_set import ImageSet
from xdiffusion.data.shards import Shards
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.tokenizer import token_ids


@dataclass(frozen=True)
class TextualInversionSettings:
    """The `textual_inversion:` section of a config.

    token: the new word, such as "<cat>", which the captions must name.
    initialiser: a word or words near it in meaning, from which it starts.
    vectors: how many embeddings it has; the initialiser's tokens in turn.
    learning_rate: of the embeddings; null is optimizer.learning_rate.
    """

    token: str
    initialiser: str
    vectors: int = 1
    learning_rate: float | None = None


def learn_token(encoder: CLIPTextEncoder, settings: TextualInversionSettings) -> None:
    """Give a frozen text encoder the new word, with embeddings that alone of it are trainable, in float32.

    Raises:
        ValueError: for settings that no encoder can have.
    """
    if not 1 <= settings.vectors <= encoder.context_length - 2:
        raise ValueError(f"textual_inversion.vectors={settings.vectors} must be in 1..{encoder.context_length - 2}")
    if settings.learning_rate is not None and settings.learning_rate <= 0:
        raise ValueError(f"textual_inversion.learning_rate={settings.learning_rate} must be above 0")
    ids = token_ids(settings.initialiser)
    if not ids:
        raise ValueError(f"textual_inversion.initialiser={settings.initialiser!r} holds no word")
    known = token_ids(settings.token)
    if len(known) == 1:
        raise ValueError(f"textual_inversion.token={settings.token!r} is a word already: put it in <>")
    start = torch.tensor(ids, device=encoder.token_embedding.weight.device)[torch.arange(settings.vectors) % len(ids)]
    encoder.add_tokens({settings.token: encoder.token_embedding.weight.detach()[start]})
    in_float32 = encoder.learned_embedding.detach().float()  # the table may be in half precision
    encoder.learned_embedding = nn.Parameter(in_float32)


def check_token_is_named(data: ImageSet | CaptionedImages | Shards, token: str) -> None:
    """Complain of captions from which the word could not be learned.

    Raises:
        ValueError: if none of them names it.
    """
    if isinstance(data, Shards):
        return  # to see all of its captions would be to read all of it
    tables = data.captions if isinstance(data, CaptionedImages) else data.prompts.captions
    if not any(token.lower() in caption.lower() for captions in tables for caption in captions):
        raise ValueError(
            f"no caption of {data.name} names textual_inversion.token={token!r}: "
            f"set captions for all pictures, such as data.captions=['a photo of {token}']"
        )
