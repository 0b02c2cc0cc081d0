"""Giving the layers of any model low-rank adapters by name, and steering a model that has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xdiffusion.lora.layers import DEFAULT_ADAPTER, LoRAConv1d, LoRAConv2d, LoRAError, LoRALayer, LoRALinear

WRAPPERS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
}
# Suffixes of module names, in this package's spelling, diffusers' and that of CLIP in transformers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("proj_in", "proj_out", "ff.proj_in", "ff.proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PRESETS = ("attention", "attention+mlp", "all-linear", "all")


def apply_lora_to_model(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 1.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "attention",
    adapter_name: str = DEFAULT_ADAPTER,
) -> nn.Module:
    """Freeze `model` and give every targeted layer a trainable adapter, in place; the output does not change by a bit.

    Args:
        model: any module; its Linear, Conv1d and Conv2d layers can be targeted.
        rank: of the update.
        alpha: lora_alpha; the update is multiplied by alpha / rank.
        dropout: on the input of the low-rank branch, while training.
        target_modules: a preset ("attention": the q, k, v and out projections; "attention+mlp": the transformers' other
            projections too; "all-linear"; "all": convolutions too), or a list of names or name endings
            (["to_q", "to_v"]), or a regular expression that must match a whole name.
        adapter_name: of the new adapter; a model may have several.

    Returns:
        The same model.

    Raises:
        LoRAError: if no layer matches, or the rank or the dropout is out of range; the model is unchanged then.
    """
    names = target_names(model, target_modules)
    check_adapter(model, names, rank, dropout, adapter_name)
    model.requires_grad_(False)
    for name in names:
        lora_layer_at(model, name).add_adapter(adapter_name, rank, alpha, dropout)
    return model


def target_names(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The names of the layers that `target_modules` means in this model (see `apply_lora_to_model`).

    Raises:
        LoRAError: if there is none.
    """
    layers = {n: m for n, m in model.named_modules() if n and base_class_of(m)}
    if not isinstance(target_modules, str):
        found = [n for n in layers if _has_ending(n, target_modules)]
    elif target_modules == "attention":
        found = [n for n in layers if _has_ending(n, ATTENTION)]
    elif target_modules == "attention+mlp":
        found = [n for n in layers if _has_ending(n, ATTENTION + MLP)]
    elif target_modules == "all-linear":
        found = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
    elif target_modules == "all":
        found = list(layers)
    else:
        found = [n for n in layers if _compiled(target_modules).fullmatch(n)]
    if not found:
        raise LoRAError(
            f"no layer of {type(model).__name__} matches the LoRA targets {target_modules!r}; allowed: "
            f"{', '.join(PRESETS)}, a list of name endings, or a regular expression; "
            f"its layers are named like {', '.join(list(layers)[:3]) or '(it has none)'}"
        )
    return found


def lora_layer_at(model: nn.Module, name: str) -> LoRALayer:
    """The LoRA layer at a name, put around the layer there if it has none yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALayer):
        layer = WRAPPERS[base_class_of(layer)].wrap(layer)
        _replace(model, name, layer)
    return layer


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """(name, layer) of all LoRA layers, in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]


def get_lora_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The A and B of one adapter, or of all: what an optimizer takes."""
    return [
        factors[name]
        for _, layer in lora_layers(model)
        for factors in (layer.lora_A, layer.lora_B)
        for name in layer.adapters
        if adapter_name in (None, name)
    ]


def set_lora_enabled(model: nn.Module, enabled: bool = True, adapter_name: str | None = None) -> None:
    """Switch one adapter, or all, on or off; off is bit-identical to the base.

    Raises:
        LoRAError: if the model has no such adapter.
    """
    for settings in _settings(model, adapter_name):
        settings.enabled = enabled


def set_lora_scale(model: nn.Module, scale: float, adapter_name: str | None = None) -> None:
    """Set the run-time strength of one adapter, or of all: 0 is the base, 1 as trained.

    Raises:
        LoRAError: if the model has no such adapter.
    """
    for settings in _settings(model, adapter_name):
        settings.scale = scale


def merge_lora_weights(model: nn.Module) -> None:
    """Replace every LoRA layer by a plain layer that holds W', so that the model is as fast as its base.

    The plain layers remember the LoRA layers they stand for: `unmerge_lora_weights` puts those back.

    Raises:
        LoRAError: if there is nothing to merge.
    """
    layers = lora_layers(model)
    if not layers:
        raise LoRAError(f"{type(model).__name__} has no LoRA layers to merge")
    for name, layer in layers:
        _replace(model, name, _merged(layer))


def unmerge_lora_weights(model: nn.Module) -> None:
    """Put the LoRA layers back, with the base weights bit for bit as they were before `merge_lora_weights`.

    Raises:
        LoRAError: if the model is not merged.
    """
    merged = [(name, module) for name, module in model.named_modules() if hasattr(module, "merged_from")]
    if not merged:
        raise LoRAError(f"{type(model).__name__} is not merged")
    for name, module in merged:
        _replace(model, name, module.merged_from[0].train(module.training))


@torch.no_grad()
def _merged(layer: LoRALayer) -> nn.Module:
    base_class = base_class_of(layer)
    plain = base_class.__new__(base_class)
    plain.__dict__ = layer.__dict__.copy()
    plain._parameters = layer._parameters.copy()
    plain._modules = {k: v for k, v in layer._modules.items() if k not in ("lora_A", "lora_B")}
    plain.weight = nn.Parameter(layer.effective_weight().clone(), requires_grad=False)
    plain.merged_from = (layer,)  # in a tuple, so that it is no submodule
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise LoRAError("a layer can be wrapped or merged only inside a model that holds it")
    parent_name, _, child_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child_name, module)


def _settings(model: nn.Module, adapter_name: str | None) -> Iterator:
    found = [
        settings
        for _, layer in lora_layers(model)
        for name, settings in layer.adapters.items()
        if adapter_name in (None, name)
    ]
    if not found:
        wanted = "LoRA adapter" if adapter_name is None else f"LoRA adapter named {adapter_name!r}"
        raise LoRAError(f"{type(model).__name__} has no {wanted}")
    return iter(found)


def check_adapter(model: nn.Module, names: list[str], rank: int, dropout: float, adapter_name: str) -> None:
    """Complain before anything is changed.

    Raises:
        LoRAError: if an adapter of this rank, dropout and name cannot be given to one of the named layers.
    """
    if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
        raise LoRAError(f"adapter_name={adapter_name!r} must hold no dot and be no method of nn.ParameterDict")
    if not 0 <= dropout < 1:
        raise LoRAError(f"LoRA dropout={dropout} must be in [0, 1)")
    for name in names:
        layer = model.get_submodule(name)
        largest = max(layer.weight.flatten(1).shape)
        if not 1 <= rank <= largest:
            raise LoRAError(
                f"LoRA rank={rank} must be in 1..{largest} for {name}, a weight {tuple(layer.weight.shape)}"
            )
        if hasattr(layer, "merged_from"):
            raise LoRAError(f"{name} is merged: call unmerge_lora_weights before adding an adapter")
        if adapter_name in getattr(layer, "adapters", ()):
            raise LoRAError(f"{name} has an adapter named {adapter_name!r} already")


def base_class_of(module: nn.Module | None) -> type[nn.Module] | None:
    """nn.Linear, nn.Conv1d or nn.Conv2d; None for a module that cannot have an adapter."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight without calling it
        return None
    return next((base for base in WRAPPERS if isinstance(module, base)), None)


def _has_ending(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LoRAError(
            f"LoRA targets {pattern!r} are neither of {', '.join(PRESETS)} nor a regular expression"
        ) from error
