"""Textual inversion ([TI] section 4.2): a new word whose embedding alone is learned, or is learned together with a LoRA.

v* = argmin_v E_{t, eps} [ || network(xt, time, context(v)) - target ||^2 ]
"""

from __future__ import annotations

import torch
from torch import nn

from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.tokenizer import token_ids
from xdiffusion.training.settings import TextualInversionSettings


def learn_token(encoder: CLIPTextEncoder, settings: TextualInversionSettings) -> None:
    """Give a frozen text encoder the new word, with embeddings that alone of it are trainable, in float32.

    Raises:
        ValueError: for settings that no encoder can have.
    """
    if not 1 <= settings.vectors <= encoder.context_length - 2:
        raise ValueError(f"textual_inversion.vectors={settings.vectors} must be in 1..{encoder.context_length - 2}")
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
