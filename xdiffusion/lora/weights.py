"""Saving adapters to a file of their own, and loading them as a contract: what matched, what did not, how strong it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdiffusion.checkpoints.native import LoRAFile, load_lora, save_lora
from xdiffusion.lora.inject import base_class_of, check_adapter, lora_layer_at, lora_layers
from xdiffusion.lora.layers import DEFAULT_ADAPTER, LoRAError, LoRALayer


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    matched: module names that took factors.
    scale: run-time strength the adapter was loaded with.
    scalings: lora_alpha / rank that occur.
    relative_delta: |scaling B A| / |W| over all matched modules (Frobenius norms).
    """

    matched: list[str]
    scale: float
    scalings: list[float]
    relative_delta: float

    def __str__(self) -> str:
        scalings = ", ".join(f"{s:g}" for s in self.scalings)
        return (
            f"{len(self.matched)} modules matched, none missing, none unexpected; "
            f"alpha/rank {scalings}, scale {self.scale:g}, |delta|/|W| {self.relative_delta:.3f}"
        )


def save_lora_weights(
    model: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    base_hash: str | None = None,
    config: Mapping[str, Any] | None = None,
    step: int = 0,
) -> None:
    """Write the factors of one adapter, by module name, with their lora_alpha.

    Raises:
        LoRAError: if no layer of the model has that adapter.
    """
    layers = {name: layer for name, layer in lora_layers(model) if adapter_name in layer.adapters}
    if not layers:
        raise LoRAError(f"{type(model).__name__} has no LoRA adapter named {adapter_name!r} to save")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A"] = layer.lora_A[adapter_name]
        tensors[f"{name}.lora_B"] = layer.lora_B[adapter_name]
    alphas = {name: layer.adapters[adapter_name].lora_alpha for name, layer in layers.items()}
    save_lora(Path(path), LoRAFile(tensors, alphas, base_hash, dict(config) if config else None, step))


def load_lora_weights(
    model: nn.Module,
    path: str | Path,
    *,
    scale: float = 1.0,
    adapter_name: str = DEFAULT_ADAPTER,
    base_hash: str | None = None,
) -> LoadReport:
    """Give `model` the adapter in a file, wrapping the layers it names; nothing is changed where this fails.

    Args:
        model: any module whose submodules bear the file's names.
        path: a LoRA of this project's format.
        scale: run-time strength.
        adapter_name: name of the adapter in the model.
        base_hash: content hash of the model; compared with the file's where both are known.

    Raises:
        LoRAError: if nothing or not everything matches, a factor is missing, of a wrong shape or not finite, the update
            is zero, the model has an adapter of that name, or the file was trained on another base.
    """
    lora = load_lora(Path(path))
    if base_hash and lora.base_hash and base_hash != lora.base_hash:
        raise LoRAError(f"{path} was trained on another base: it names {lora.base_hash}, this model is {base_hash}")
    modules = _checked_modules(model, lora, adapter_name, path)
    for name in modules:
        layer = lora_layer_at(model, name)
        rank = lora.tensors[f"{name}.lora_A"].shape[0]
        layer.add_adapter(adapter_name, rank, lora.alphas[name])
        layer.adapters[adapter_name].scale = scale
        with torch.no_grad():
            layer.lora_A[adapter_name].copy_(lora.tensors[f"{name}.lora_A"])
            layer.lora_B[adapter_name].copy_(lora.tensors[f"{name}.lora_B"])
    return _report(model, modules, adapter_name)


def parse_lora_spec(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:SCALE" -> (path, scale).

    Raises:
        LoRAError: if what follows the last colon is no finite number and the whole is no file.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LoRAError(f"--lora_path {text!r}: the scale {scale!r} behind the colon must be a number, as in FILE:0.8")
    return Path(path), value


def _checked_modules(model: nn.Module, lora: LoRAFile, adapter_name: str, path: str | Path) -> list[str]:
    """The module names of the file, all of which the model has with fitting shapes."""
    present = dict(model.named_modules())
    names = sorted(lora.alphas)
    unexpected = [n for n in names if base_class_of(present.get(n)) is None]
    if unexpected:
        raise LoRAError(
            f"{path} does not fit this model: {len(unexpected)} of its {len(names)} modules are not there, "
            f"such as {unexpected[0]}"
        )
    stray = lora.tensors.keys() - {f"{n}.lora_{x}" for n in names for x in "AB"}
    if stray:
        raise LoRAError(f"{path}: {min(stray)} is neither a lora_A nor a lora_B")
    for name in names:
        factors = [lora.tensors.get(f"{name}.lora_{x}") for x in "AB"]
        if None in factors:
            raise LoRAError(f"{path}: one factor of {name} is missing")
        if not all(factor.isfinite().all() for factor in factors):
            raise LoRAError(f"{path}: the factors of {name} are not finite")
        _check_shapes(name, present[name].weight, *factors, path)
        check_adapter(model, [name], factors[0].shape[0], 0.0, adapter_name)
    if not any(lora.tensors[f"{n}.lora_B"].any() for n in names):
        raise LoRAError(f"{path}: every lora_B is zero, so it would change nothing")
    return names


def _check_shapes(name: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor, path: str | Path) -> None:
    ranks, ones = lora_A.shape[:1], [1] * (weight.dim() - 2)
    if lora_A.shape != (*ranks, *weight.shape[1:]) or lora_B.shape != (*weight.shape[:1], *ranks, *ones):
        raise LoRAError(
            f"{path} does not fit this model: {name} has weight {tuple(weight.shape)}, "
            f"the file's factors are A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
        )


@torch.no_grad()
def _report(model: nn.Module, modules: list[str], adapter_name: str) -> LoadReport:
    layers: list[LoRALayer] = [model.get_submodule(name) for name in modules]
    deltas = torch.stack([layer.delta(adapter_name).square().sum() for layer in layers])
    weights = torch.stack([layer.weight.float().square().sum() for layer in layers])
    settings = [layer.adapters[adapter_name] for layer in layers]
    scalings = sorted({s.scaling for s in settings})
    return LoadReport(modules, settings[0].scale, scalings, float((deltas.sum() / weights.sum()).sqrt()))
