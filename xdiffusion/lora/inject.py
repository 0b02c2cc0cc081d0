"""Giving the layers of any model low-rank adapters by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from xdiffusion.checkpoints.patterns import is_ending, module_pattern
from xdiffusion.lora.layers import LoRAConv1d, LoRAConv2d, LoRALayer, LoRALinear
from xdiffusion.lora.settings import DEFAULT_ADAPTER, Init, LoRAError, check_adapter_name, check_settings

WRAPPERS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
}
# Suffixes of module names, in this package's spelling, diffusers' and that of CLIP in transformers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("proj_in", "proj_out", "ff.proj_in", "ff.proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PRESETS = ("attention", "attention+mlp", "all-linear", "all")
# Parts of other libraries that hand the weights of these layers on; timm's call them where there is no q_bias to add.
READ_WITHOUT_A_CALL = {
    "open_clip.modified_resnet.AttentionPool2d": ("q_proj", "k_proj", "v_proj", "c_proj"),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "transformers.models.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": ("dense", "decoder"),
}
# Classes of diffusers whose forward, while their `lora_layer` is None, only repeats that of their base.
REPEATS_ITS_BASE = ("LoRACompatibleLinear", "LoRACompatibleConv")


def apply_lora_to_model(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 1.0,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "attention",
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    use_rslora: bool = False,
    use_dora: bool = False,
    init: Init = "zero_b",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> nn.Module:
    """Freeze `model` and give every targeted layer a trainable adapter, in place.

    Adapters that it has already are frozen too. The output does not change by a bit with init="zero_b", and by rounding with
    the others.

    Args:
        model: any module; its Linear, Conv1d and Conv2d layers can be targeted, and subclasses that keep their forward.
        rank: of the update.
        alpha: lora_alpha; the update is multiplied by alpha / rank.
        dropout: on the input of the low-rank branch, while training.
        target_modules: a preset ("attention": the q, k, v and out projections; "attention+mlp": the transformers' other
            projections too; "all-linear"; "all": convolutions too), or a list of names or name endings
            (["to_q", "to_v"]), or a regular expression that must match a whole name.
        adapter_name: of the new adapter; a model may have several.
        use_rslora: multiply by alpha / sqrt(rank) instead ([rsLoRA] section 3).
        use_dora: learn the length of each output's weight apart from its direction ([DoRA] section 4.1).
        init: how the factors begin; see `initialise`.
        rank_pattern, alpha_pattern: other ranks and alphas for some of the targeted layers, by regular expressions that
            must match a name or an ending of it behind a dot, as peft's do; the first that matches counts.

    Returns:
        The same model.

    Raises:
        LoRAError: if no layer matches the targets or one entry of their list, a pattern matches none of those that do, or
            a layer cannot have such an adapter; the model is unchanged then.
    """
    names = target_names(model, target_modules)
    ranks = _by_pattern(names, rank, rank_pattern, "rank_pattern")
    alphas = _by_pattern(names, alpha, alpha_pattern, "alpha_pattern")
    for name in names:
        check_adapter(model, name, ranks[name], dropout, adapter_name, init, alphas[name])
    model.requires_grad_(False)
    variant = {"use_rslora": use_rslora, "use_dora": use_dora, "init": init}
    for name, layer in lora_layers_at(model, names).items():
        layer.add_adapter(adapter_name, ranks[name], alphas[name], dropout, **variant)
    return model


def _examples(layers: Iterable[str]) -> list[str]:
    """Some names, each of another ending."""
    first: dict[str, str] = {}
    for name in layers:
        first.setdefault(name.rpartition(".")[2], name)
    return list(first.values())[:8]


def target_names(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The names of the layers that `target_modules` means in this model (see `apply_lora_to_model`).

    A layer that has several names is known by its first, whichever of them matches.

    Raises:
        LoRAError: if there is none, or none for one of the entries of a list.
    """
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and base_class_of(m)}
    found = _matching(layers, target_modules)
    if not found:
        raise LoRAError(
            f"no layer of {type(model).__name__} matches the LoRA targets {target_modules!r}; allowed: "
            f"{', '.join(PRESETS)}, a list of name endings such as [to_q], or a regular expression that matches whole "
            rf"names, such as .*\.to_q; its layers are named like {', '.join(_examples(layers)) or '(it has none)'}"
        )
    if not isinstance(target_modules, str):
        _check_each_matches(type(model).__name__, list(layers), target_modules)
    left_out = [n for n in found if target_modules in PRESETS and (has_own_forward(layers[n]) or reader_of(model, n))]
    if 0 < len(left_out) < len(found):
        warnings.warn(
            f"the LoRA targets {target_modules!r} pass by {len(left_out)} layers with a forward of their own, or that are "
            f"not called, such as {left_out[0]}, a {type(layers[left_out[0]]).__name__}",
            stacklevel=3,
        )
        found = [n for n in found if n not in left_out]
    first_names = {module: name for name, module in model.named_modules()}
    return list(dict.fromkeys(first_names[layers[name]] for name in found))


def _matching(layers: Mapping[str, nn.Module], target_modules: str | Sequence[str]) -> list[str]:
    """The names of `layers` that `target_modules` means, of all kinds."""
    if not isinstance(target_modules, str):
        return [n for n in layers if _has_ending(n, target_modules)]
    if target_modules == "attention":
        return [n for n in layers if _has_ending(n, ATTENTION)]
    if target_modules == "attention+mlp":
        return [n for n in layers if _has_ending(n, ATTENTION + MLP)]
    if target_modules == "all-linear":
        return [n for n, m in layers.items() if isinstance(m, nn.Linear)]
    if target_modules == "all":
        return list(layers)
    try:
        return list(filter(module_pattern(target_modules).fullmatch, layers))
    except ValueError as error:
        presets = ", ".join(PRESETS)
        raise LoRAError(
            f"LoRA targets {target_modules!r} are neither of {presets} nor a regular expression: {error}"
        ) from error


def _check_each_matches(model: str, names: Sequence[str], endings: Sequence[str]) -> None:
    for ending in endings:
        if not any(_has_ending(name, [ending]) for name in names):
            known = {name.split(".", i)[-1] for name in names for i in range(name.count(".") + 1)}
            near = get_close_matches(ending, sorted(known))
            raise LoRAError(
                f"{ending!r} of the LoRA targets matches no layer of {model}, a Linear or a convolution"
                + (f"; near to it: {', '.join(near)}" if near else "")
            )


def lora_layers_at(model: nn.Module, names: Iterable[str]) -> dict[str, LoRALayer]:
    """The LoRA layers at these names, each put around the layer there, under all its names, if it has none yet."""
    layers = {name: model.get_submodule(name) for name in names}
    plain = [layer for layer in layers.values() if not isinstance(layer, LoRALayer)]
    wrapped = {layer: WRAPPERS[base_class_of(layer)].wrap(layer) for layer in plain}
    replace_modules(model, wrapped)
    return {name: wrapped.get(layer, layer) for name, layer in layers.items()}


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """(name, layer) of all LoRA layers, in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer)]


def layers_with(model: nn.Module, adapter_name: str | None, purpose: str = "") -> dict[str, LoRALayer]:
    """The LoRA layers that have an adapter, or (None) any, by name.

    Raises:
        LoRAError: if there are none; it ends with `purpose`, such as " to merge".
    """
    found = {n: layer for n, layer in lora_layers(model) if adapter_name is None or adapter_name in layer.adapters}
    if not found:
        named = "" if adapter_name is None else f" named {adapter_name!r}"
        raise LoRAError(f"{type(model).__name__} has no LoRA adapter{named}{purpose}")
    return found


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the values of `new` where its keys are, wherever in the model that is.

    Raises:
        LoRAError: if the model itself is a key.
    """
    if model in new:
        raise LoRAError("a layer can be wrapped or merged only inside a model that holds it")
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):  # named_children hides second names
            if child in new:
                setattr(parent, child_name, new[child])


def check_adapter(
    model: nn.Module,
    name: str,
    rank: int,
    dropout: float,
    adapter_name: str,
    init: Init = "zero_b",
    lora_alpha: float = 1.0,
) -> None:
    """Complain before anything is changed.

    Raises:
        LoRAError: if the layer `name` cannot have an adapter of these settings and of the name `adapter_name`.
    """
    check_adapter_name(adapter_name)
    layer = model.get_submodule(name)
    check_layer(name, layer)
    check_settings(rank, dropout, init, layer.weight.shape, name, lora_alpha)
    if hasattr(layer, "merged_from"):
        raise LoRAError(f"{name} is merged: call unmerge_lora_weights before adding an adapter")
    if adapter_name in getattr(layer, "adapters", ()):
        raise LoRAError(
            f"{name} has an adapter named {adapter_name!r} already: take it away with "
            f"remove_lora(model, {adapter_name!r}), or choose another adapter_name"
        )
    if init == "pissa" and not (layer.weight.is_meta or layer.weight.isfinite().all()):
        raise LoRAError(f"init='pissa' of {name}: its weight is not finite")
    if kind := reader_of(model, name):
        raise LoRAError(f"{name}: {kind} reads its weight without calling it, so that a LoRA would have no effect")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise LoRAError(
            f"{name}: the fast path of nn.TransformerEncoderLayer reads its weight without calling it, so that a "
            "LoRA would have no effect in evaluation; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def reader_of(model: nn.Module, name: str) -> str | None:
    """The class that reads the weight of a layer without calling it; None where it is called, as far as is known."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(parent).__mro__]
    readers = (kind for kind in kinds if child in READ_WITHOUT_A_CALL.get(kind, ()))
    return next(readers, None) if getattr(parent, "q_bias", True) is not None else None


def check_unmerged(model: nn.Module, adapter_name: str | None, doing: str) -> None:
    """Complain of an adapter (None: of any) that is merged into a weight, which `doing` would pass by.

    Raises:
        LoRAError: naming the layer.
    """
    for name, layer in model.named_modules():
        (original,) = getattr(layer, "merged_from", (None,))
        inside = original.adapters.keys() - getattr(layer, "adapters", {}).keys() if original else ()
        if adapter_name in inside or (adapter_name is None and inside):
            raise LoRAError(f"{name or type(model).__name__} is merged: call unmerge_lora_weights before {doing}")


def check_layer(name: str, layer: nn.Module) -> None:
    """Complain of a layer of a kind that has adapters, but whose weight an adapter cannot be added to.

    Raises:
        LoRAError: if it has a forward of its own, or a weight that is formed on each call or is not there yet.
    """
    if has_own_forward(layer):
        raise LoRAError(
            f"{name} is a {type(layer).__name__} with a forward of its own, which its LoRA would have to repeat: adapters are "
            f"for nn.Linear, nn.Conv1d, nn.Conv2d and subclasses that leave forward and _conv_forward alone"
        )
    if is_parametrized(layer) or "weight" not in layer._parameters:
        raise LoRAError(
            f"{name} forms its weight or bias anew on each call (weight_norm, spectral_norm, prune, a parametrization): "
            "make that permanent first, as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    if is_lazy(layer.weight):
        raise LoRAError(f"{name} has no weight yet: call the model once, so that {type(layer).__name__} knows its inputs")


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer that is no LoRA layer computes in another way than its base class does."""
    kind, base = type(layer), base_class_of(layer)
    if isinstance(layer, LoRALayer) or (kind.__name__ in REPEATS_ITS_BASE and layer.lora_layer is None):
        return False
    if "forward" in vars(layer) or kind.forward is not base.forward:
        return True
    # with `convolve` the LoRA layer knows how to convolve in that way too
    return base is not nn.Linear and kind._conv_forward is not base._conv_forward and not hasattr(layer, "convolve")


def base_class_of(module: nn.Module | None) -> type[nn.Module] | None:
    """nn.Linear, nn.Conv1d or nn.Conv2d; None for a module that cannot have an adapter."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention reads its weight without calling it
        return None
    return next((base for base in WRAPPERS if isinstance(module, base)), None)


def _by_pattern(names: Sequence[str], default: float, values: Mapping[str, float] | None, argument: str) -> dict:
    """The value of the first pattern that matches each name, else the default."""
    try:
        matching = {pattern: {name for name in names if is_ending(pattern, name)} for pattern in values or {}}
    except ValueError as error:
        raise LoRAError(f"{argument}: {error}") from error
    for pattern, found in matching.items():
        if not found:
            raise LoRAError(f"{argument}: {pattern!r} matches none of the targeted layers, named like {', '.join(names[:3])}")
    first = {n: next((pattern for pattern, found in matching.items() if n in found), None) for n in names}
    return {n: default if pattern is None else values[pattern] for n, pattern in first.items()}


def _has_ending(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
