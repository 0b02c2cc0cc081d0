"""Putting adapters into the weights: for a while, so that the model is as fast as its base, or for good.

A merged layer is a plain layer (or, where some of its adapters are still apart, a LoRA layer of the others) that holds
W + their updates and remembers the LoRA layer it stands for. Nothing is ever subtracted, so unmerging is exact. The
remembered layer follows the merged one in dtype and device; other weights would reach only one of the two, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xdiffusion.lora.inject import check_layer, layers_with, replace_modules
from xdiffusion.lora.layers import LoRALayer
from xdiffusion.lora.settings import LoRAError


def merge_lora_weights(model: nn.Module, adapter_name: str | None = None) -> None:
    """Put one adapter, or all, into the weights, each at its present strength; `unmerge_lora_weights` takes it out.

    A layer all of whose adapters are merged is a plain layer. Until it is unmerged or folded it takes no load_state_dict.

    Raises:
        LoRAError: if there is nothing to merge, or only some of the adapters where one of them is DoRA.
    """
    new = {}
    merged = any(adapter_name in (None, *m.merged_from[0].adapters) for m in model.modules() if hasattr(m, "merged_from"))
    for name, layer in layers_with(model, adapter_name, f" to merge{': it is merged already' * merged}").items():
        check_layer(name, layer)
        apart = [n for n in layer.adapters if adapter_name not in (None, n)]
        if apart and any(settings.use_dora for settings in layer.adapters.values()):
            raise LoRAError(f"{name} has a DoRA adapter, which acts on the others' updates too: merge all at once")
        new[layer] = _merged(layer, apart)
    replace_modules(model, new)


def unmerge_lora_weights(model: nn.Module, adapter_name: str | None = None) -> None:
    """Undo `merge_lora_weights` for one adapter, or for all: the base weights are bit for bit as they were before.

    Where the model has been cast or moved meanwhile they are those in the dtype and on the device that it has now.

    Raises:
        LoRAError: if the model, or the adapter, is not merged.
    """
    new = {}
    for module in [m for m in model.modules() if hasattr(m, "merged_from")]:
        names, apart = module.merged_from[0].adapters, list(getattr(module, "adapters", ()))
        if adapter_name is None:
            new[module] = _merged(module, apart=list(names))
        elif adapter_name in names and adapter_name not in apart:
            new[module] = _merged(module, apart=[*apart, adapter_name])
    if not new:
        what = type(model).__name__ if adapter_name is None else f"the LoRA adapter {adapter_name!r}"
        raise LoRAError(f"{what} is not merged")
    replace_modules(model, new)


def fold_lora_weights(model: nn.Module) -> None:
    """Merge all adapters for good: plain layers, frozen, that remember no LoRA and keep none of its memory.

    Raises:
        LoRAError: if the model has no LoRA, merged or not.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer) or hasattr(m, "merged_from")}
    if not layers:
        raise LoRAError(f"{type(model).__name__} has no LoRA to fold")
    new = {}
    for name, layer in layers.items():
        check_layer(name, layer)
        original = _original(layer)
        new[layer] = _with_updates(original, list(original.adapters)).train(layer.training)
    replace_modules(model, new)


def _merged(layer: nn.Module, apart: list[str]) -> nn.Module:
    """The LoRA layer that `layer` is or stands for, with all adapters but those in `apart` in its weight."""
    original = _original(layer)
    inside = [name for name in original.adapters if name not in apart]
    if not inside:
        return original.train(layer.training)
    merged = _with_updates(original, inside)
    if apart:
        merged = type(original).wrap(merged)
        merged.share_adapters(original, apart)
    merged.merged_from = (original,)  # in a tuple, so that it is no submodule
    merged._load_state_dict_pre_hooks = merged._load_state_dict_pre_hooks.copy()  # so far the original's own
    merged._register_load_state_dict_pre_hook(_refuse_other_weights)
    return merged.train(layer.training)


def _original(layer: nn.Module) -> LoRALayer:
    """The LoRA layer that `layer` is or stands for, in the dtype and on the device of `layer`."""
    if not hasattr(layer, "merged_from"):
        return layer
    (original,) = layer.merged_from
    if original.weight.dtype != layer.weight.dtype:  # else the factors keep theirs
        original.to(layer.weight.dtype)
    return original.to(layer.weight.device)


@torch.inference_mode(False)  # whose tensors no training could use any more
@torch.no_grad()
def _with_updates(original: LoRALayer, names: list[str]) -> nn.Module:
    """The plain layer with these adapters in its weight."""
    plain = original.unwrap()
    plain.weight = nn.Parameter(original.effective_weight(names).clone(), requires_grad=False)
    return plain


def _refuse_other_weights(state_dict: Mapping[str, Any], prefix: str, *rest: object) -> None:
    name = prefix.removesuffix(".") or "the layer"
    raise LoRAError(f"{name} is merged: call unmerge_lora_weights, or fold_lora_weights, before load_state_dict")
