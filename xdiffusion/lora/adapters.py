"""Steering a model that has adapters: how strong each is, on or off, taken away, or swapped for another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from xdiffusion.checkpoints.lora_file import LoRAFactors
from xdiffusion.lora.inject import (
    base_class_of,
    check_adapter,
    check_layer,
    check_unmerged,
    layers_with,
    lora_layers,
    lora_layers_at,
    replace_modules,
)
from xdiffusion.lora.layers import LoRALayer
from xdiffusion.lora.settings import DEFAULT_ADAPTER, AdapterSettings, LoRAError, check_factors, check_scale


def get_lora_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """A, B and DoRA's magnitudes of one adapter, or of all: what an optimizer takes.

    Adapters that a model had before another was added are frozen (`requires_grad`) as its base is.
    """
    return [
        parameter
        for _, layer in lora_layers(model)
        for name in layer.adapters
        if adapter_name in (None, name)
        for parameter in layer.trained_parameters(name)
    ]


def set_lora_enabled(model: nn.Module, enabled: bool = True, adapter_name: str | None = None) -> None:
    """Switch one adapter, or all, on or off; off is bit-identical to the base.

    Raises:
        LoRAError: if the model has no such adapter, or it is merged.
    """
    check_unmerged(model, adapter_name, "switching an adapter")
    for settings in _settings(model, adapter_name):
        settings.enabled = enabled


def set_lora_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """Set the run-time strength of one adapter, or of all: 0 is the base, 1 as trained.

    Raises:
        LoRAError: if the model has no such adapter, or it is merged, or the scale is no finite number.
    """
    check_scale(scale)
    check_unmerged(model, adapter_name, "changing a scale")
    for settings in _settings(model, adapter_name):
        settings.scale = float(scale)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """All adapters off inside, and afterwards each as it was; a model without adapters is left alone.

    Raises:
        LoRAError: if one is merged.
    """
    check_unmerged(model, None, "switching adapters off")
    settings = [s for _, layer in lora_layers(model) for s in layer.adapters.values() if s.enabled]
    for each in settings:
        each.enabled = False
    try:
        yield
    finally:
        for each in settings:
            each.enabled = True


def remove_lora(model: nn.Module, adapter_name: str | None = None) -> None:
    """Take one adapter, or all, out of the model; a layer that loses its last one is the plain layer again, bit for bit.

    The base weights stay frozen, as `apply_lora_to_model` left them.

    Raises:
        LoRAError: if the model has no such adapter, or a layer that has it is partly merged.
    """
    layers = layers_with(model, adapter_name)
    for name, layer in layers.items():
        check_layer(name, layer)
        if hasattr(layer, "merged_from"):
            raise LoRAError(f"{name} is merged: call unmerge_lora_weights before removing an adapter")
    for layer in layers.values():
        for name in list(layer.adapters) if adapter_name is None else [adapter_name]:
            layer.remove_adapter(name)
    _unwrap_empty(model, layers.values())


def swap_lora(model: nn.Module, modules: Mapping[str, LoRAFactors], adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Make an adapter hold exactly these factors, of whatever ranks: overwritten, added and taken away as needed.

    Scale, dropout and switch stay, and so does every parameter whose shape does.

    Args:
        model: with or without that adapter.
        modules: factors by module name, as in a `LoRAFile`.
        adapter_name: of the adapter.

    Raises:
        LoRAError: if a module is not there, is merged, cannot have an adapter or has a weight of another shape; the model
            is unchanged then.
    """
    present = dict(model.named_modules())
    old = {n: layer.adapters[adapter_name] for n, layer in lora_layers(model) if adapter_name in layer.adapters}
    for name, factors in modules.items():
        layer = present.get(name)
        if base_class_of(layer) is None or hasattr(layer, "merged_from"):
            raise LoRAError(f"{type(model).__name__} has no unmerged layer named {name}")
        check_layer(name, layer)
        check_factors(factors, layer.weight.shape, name)
        if name not in old:
            check_adapter(model, name, factors.rank, 0.0, adapter_name)
    kept = next(iter(old.values()), None)
    for name, layer in lora_layers_at(model, modules).items():
        layer.set_factors(adapter_name, modules[name])
        if kept is not None and name not in old:
            new = layer.adapters[adapter_name]
            new.dropout, new.scale, new.enabled = kept.dropout, kept.scale, kept.enabled
    left = [present[name] for name in old.keys() - modules.keys()]
    for layer in left:
        layer.remove_adapter(adapter_name)
    _unwrap_empty(model, left)


def _unwrap_empty(model: nn.Module, layers: Iterable[LoRALayer]) -> None:
    replace_modules(model, {layer: layer.unwrap() for layer in layers if not layer.adapters})


def _settings(model: nn.Module, adapter_name: str | None) -> list[AdapterSettings]:
    layers = layers_with(model, adapter_name).values()
    return [s for layer in layers for name, s in layer.adapters.items() if adapter_name in (None, name)]
