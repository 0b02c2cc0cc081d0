"""Embeddings of prompts by a frozen text encoder, each computed once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xdiffusion.text_encoders.clip import CLIPTextEncoder

MAX_BYTES = 256 * 2**20


class PromptCache:
    """list of B prompts -> (B, L, D), running the encoder only for prompts not seen before.

    The encoder's weights must not change while the cache is in use.

    Args:
        encoder: a frozen text encoder.
    """

    def __init__(self, encoder: CLIPTextEncoder):
        self.encoder = encoder
        self.rows: dict[str, int] = {}
        self.table: Tensor | None = None  # (rows, L, D)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Float[Tensor, "B L D"]:
        new = [p for p in dict.fromkeys(prompts) if p not in self.rows]
        if new:
            if self.table is not None and self.table.nbytes > MAX_BYTES:
                self.rows, self.table = {}, None
                new = list(dict.fromkeys(prompts))
            # one at a time: in a batch the last bits can depend on its other prompts, and those on when the run began
            embedded = torch.cat([self.encoder.encode([prompt]) for prompt in new])
            self.rows |= {prompt: len(self.rows) + i for i, prompt in enumerate(new)}
            self.table = embedded if self.table is None else torch.cat([self.table, embedded])
        return self.table[torch.tensor([self.rows[p] for p in prompts], device=self.table.device)]
