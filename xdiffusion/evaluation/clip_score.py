"""CLIP score: how well images fit their prompts, in the space that a CLIP's two towers share ([CLIPScore] eq. 1)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def clip_score(images: Float[Tensor, "N E"], texts: Float[Tensor, "N E"]) -> Float[Tensor, " N"]:
    """100 max(cos, 0) of each pair of unit vectors, in [0, 100]; read it against the score of real images."""
    return 100 * (images * texts).sum(1).clamp(min=0)
