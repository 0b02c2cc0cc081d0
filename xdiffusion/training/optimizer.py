"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from xdiffusion.training.settings import OptimizerSettings, check_library


def build_optimizer(groups: Iterable[Sequence[nn.Parameter]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, each with a learning rate of its own.

    Raises:
        ValueError: for "adamw8bit" without bitsandbytes.
    """
    parameters = [{"params": list(group)} for group in groups]
    shared = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **shared)
    check_library(settings.kind)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **shared)
