"""The LoRA layer of a layer whose class is a subclass of nn.Linear or a convolution: of both classes, so that it keeps what
the subclass adds, such as its own way to convolve (`layers.convolution`)."""

from __future__ import annotations

from functools import cache

from torch import nn


@cache
def lora_class(wrapper: type[nn.Module], layer_class: type[nn.Module]) -> type[nn.Module]:
    """`wrapper` for layers of this class, itself where that is the class it is made for."""
    if layer_class is wrapper.base_class:
        return wrapper
    body = {"base_class": layer_class, "__reduce_ex__": _reduce_ex}
    return type(f"LoRA{layer_class.__name__}", (wrapper, layer_class), body)


def _reduce_ex(layer: nn.Module, protocol: int) -> tuple:
    """What pickle and copy make of a layer: its class has no name to be found by, those that it is made of have."""
    _, _, *state = object.__reduce_ex__(layer, protocol)
    return _new_layer, type(layer).__bases__, *state


def _new_layer(wrapper: type[nn.Module], layer_class: type[nn.Module]) -> nn.Module:
    kind = lora_class(wrapper, layer_class)
    return kind.__new__(kind)
