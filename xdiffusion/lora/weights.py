"""Saving adapters to a file of their own, and loading them as a contract: what matched, what did not, how strong it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdiffusion.checkpoints.component_names import COMPILED, component_of, exchange_name, plain_name
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import LayerTable, read_lora, write_lora
from xdiffusion.checkpoints.lora_formats.factors import fitted, said_of_xl
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS, weights_file
from xdiffusion.lora.base_identity import check_base, sample_of
from xdiffusion.lora.inject import (
    base_class_of,
    check_adapter,
    check_layer,
    check_unmerged,
    lora_layers,
    lora_layers_at,
)
from xdiffusion.lora.layers import LoRALayer
from xdiffusion.lora.settings import DEFAULT_ADAPTER, LoRAError, check_scale


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    matched: module names that took factors.
    missing: those that have an adapter of that name and are not in the file; it changes nothing there.
    scale: run-time strength the adapter was loaded with.
    scalings: lora_alpha / rank, of rsLoRA lora_alpha / sqrt(rank), that occur.
    relative_delta: |scaling B A| / |W| over all matched modules (Frobenius norms).
    format: of the file.
    left_out: what the file has and the model has no place for: modules of a whole component, learned tokens.
    repairs: what was wrong with the file and could be mended, and of its base what is not as it was in training.
    """

    matched: list[str]
    missing: list[str]
    scale: float
    scalings: list[float]
    relative_delta: float
    format: str = "native"
    left_out: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()

    def __str__(self) -> str:
        scalings = ", ".join(f"{s:g}" for s in self.scalings)
        missing = f"{len(self.missing)} missing (such as {self.missing[0]})" if self.missing else "none missing"
        line = (
            f"{len(self.matched)} modules matched, {missing}, none unexpected; "
            f"alpha/rank {scalings}, scale {self.scale:g}, |delta|/|W| {self.relative_delta:.3f}"
        )
        return "; ".join([line, *(f"left out: {what}" for what in self.left_out), *self.repairs])


def save_lora_weights(
    model: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    base_hash: str | None = None,
    config: Mapping[str, Any] | None = None,
    step: int = 0,
    tokens: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the factors of one adapter, by module name, with their lora_alpha, and learned tokens, in our format.

    The names are those in the model itself, also where torch.compile, DataParallel or DistributedDataParallel is around it.
    `dtype` is that of the factors in the file; None keeps theirs. Where a path ends in .pt, .safetensors takes its place, as
    everywhere here; reading takes that for it too.

    Returns:
        The path of the file.

    Raises:
        LoRAError: if no layer of the model has that adapter, one has it merged, or the model is itself a layer, without a name.
        CheckpointError: if `dtype` cannot hold the factors, or the file cannot be written.
    """
    said = {"base_hash": base_hash, "config": config, "step": step, "tokens": tokens}
    path = Path(path).with_suffix(SAFETENSORS) if Path(path).suffix in PICKLED else Path(path)
    write_lora(lora_file_of(model, adapter_name=adapter_name, **said), path, "native", dtype=dtype)
    return path


def lora_file_of(
    model: nn.Module,
    *,
    adapter_name: str = DEFAULT_ADAPTER,
    base_hash: str | None = None,
    config: Mapping[str, Any] | None = None,
    step: int = 0,
    tokens: Mapping[str, torch.Tensor] | None = None,
) -> LoRAFile:
    """What `save_lora_weights` writes; the factors are those of the model, not copies.

    Raises:
        LoRAError: see there.
    """
    check_unmerged(model, adapter_name, "saving the adapter")
    layers = {plain_name(model, name): layer for name, layer in lora_layers(model) if adapter_name in layer.adapters}
    if not layers:
        raise LoRAError(f"{type(model).__name__} has no LoRA adapter named {adapter_name!r} to save")
    if "" in layers:
        raise LoRAError(
            f"the {type(layers['']).__name__} itself was given: a file knows layers by their names in a model; save one that "
            "holds it, such as nn.ModuleDict(layer=...)"
        )
    modules = {name: layer.factors(adapter_name) for name, layer in layers.items()}
    sample = sample_of({name: layer.weight for name, layer in layers.items()}) if base_hash else {}
    return LoRAFile(modules, tokens=tokens or {}, base_hash=base_hash, base_sample=sample, config=config, step=step)


def load_lora_weights(
    model: nn.Module,
    path: str | Path,
    *,
    scale: float = 1.0,
    adapter_name: str = DEFAULT_ADAPTER,
    base_hash: str | None = None,
    allow_other_base: bool = False,
    replaced_words: Collection[str] = (),
) -> LoadReport:
    """Give `model` the adapter in a file, wrapping the layers it names; nothing is changed where this fails.

    An adapter of that name which changes nothing yet, as `apply_lora_to_model` makes it, takes the file's factors in. The base
    stays as trainable as it was: to train the LoRA further, freeze it (`model.requires_grad_(False)` before) or take
    `get_lora_parameters`.

    Args:
        model: any module that has the layers. Stable Diffusion's are found in our spelling, in diffusers' (a UNet alone,
            or nn.ModuleDict(unet=pipe.unet, text_encoder=pipe.text_encoder)) and in transformers'.
        path: a LoRA of any format, see `read_lora`. A component that the model does not have is left out and reported.
        scale: run-time strength.
        adapter_name: name of the adapter in the model.
        base_hash: content hash of the model; compared with the file's where both are known, and where they differ, or it is
            not given, the weights with the file's sample of them, which knows them in any precision.
        allow_other_base: apply a LoRA that was trained on other weights of these shapes.
        replaced_words: learned words of the text encoder that are taken away, those of a LoRA whose place this one takes.

    Raises:
        CheckpointError: if the file is missing, damaged, or of no known format.
        LoRAError: if nothing or not everything matches, a layer cannot have an adapter, a factor is of a wrong shape or not
            finite, the update is zero, the model has an adapter of that name that changes something, the scale is no finite
            number, the file was trained on another base, or a learned word of it stands for another embedding already or is of
            another width.
    """
    check_scale(scale)
    path = weights_file(path)
    lora = read_lora(path, LayerTable.of(model))
    modules, left_out = _by_own_names(model, lora.modules, path)
    weights = {plain_name(model, name): model.get_submodule(name).weight for name in modules}
    other_form = None if allow_other_base else check_base(lora, base_hash, weights, path)
    modules = _checked(model, modules, adapter_name, path)
    text_encoder = getattr(model, "text_encoder", None)
    takes_tokens = hasattr(text_encoder, "add_tokens")
    if takes_tokens:
        try:
            text_encoder.add_tokens(lora.tokens, replaced_words)
        except ValueError as error:
            raise LoRAError(f"{path}: {error}") from error
    for name, layer in lora_layers_at(model, modules).items():
        layer.set_factors(adapter_name, modules[name])
        layer.adapters[adapter_name].scale = scale
        layer.adapters[adapter_name].enabled = True
    if lora.tokens and not takes_tokens:
        left_out.append(f"{len(lora.tokens)} learned tokens, {', '.join(lora.tokens)}")
    repairs = (*lora.repairs, *([other_form] if other_form else []))
    said = {"format": lora.format, "left_out": tuple(left_out), "repairs": repairs}
    return _report(model, list(modules), adapter_name, **said)


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
        raise LoRAError(f"{text!r}: the scale {scale!r} behind the colon must be a number, as in FILE:0.8")
    return Path(path), value


def _by_own_names(
    model: nn.Module, modules: Mapping[str, LoRAFactors], path: str | Path
) -> tuple[dict[str, LoRAFactors], list[str]]:
    """The file's factors by the model's module names, and a line for each component that the model does not have."""
    layers = [name for name, module in model.named_modules() if base_class_of(module) and name]
    exact = {plain_name(model, name): name for name in layers}
    own = {exchange_name(plain): name for plain, name in exact.items()}
    components = {component_of(name) for name in own}
    found, absent, unexpected, of_another_model = {}, {}, [], False
    for name, factors in sorted(modules.items()):
        exchange = exchange_name(name)
        if exchange not in own:  # of a file that was saved with a wrapper's names
            exchange = exchange_name(name.replace(f"{COMPILED}.", "").removeprefix("module."))
        component = component_of(exchange)
        if place := exact.get(name) or own.get(exchange):
            found[place] = factors
            of_another_model |= component is None
        elif component and component not in components:
            absent.setdefault(component, []).append(name)
        else:
            unexpected.append(name)
    if of_another_model:  # its layers can be named as a text encoder's, Llama's `layers.0.self_attn.q_proj`
        unexpected += [name for part, names in absent.items() for name in names if not name.startswith(f"{part}.")]
    if unexpected or not found:
        missing = list(dict.fromkeys(unexpected + [name for names in absent.values() for name in names]))
        raise LoRAError(
            f"{path} does not fit this model: {len(missing)} of its {len(modules)} modules are not there"
            + (f", such as {missing[0]}" if missing else "")
            + said_of_xl({name: factors.lora_A for name, factors in modules.items()})
        )
    return found, [f"{len(names)} modules of the {component}" for component, names in absent.items()]


def _checked(
    model: nn.Module, modules: Mapping[str, LoRAFactors], adapter_name: str, path: str | Path
) -> dict[str, LoRAFactors]:
    """The factors in the dimensions of the model's weights."""
    checked = {}
    for name, factors in modules.items():
        layer = model.get_submodule(name)
        check_layer(name, layer)
        if hasattr(layer, "merged_from"):
            raise LoRAError(f"{name} is merged: call unmerge_lora_weights before loading a LoRA")
        weight = layer.weight
        if weight.is_meta:
            raise LoRAError(f"{name} has no values yet, it is on the meta device: load the model's weights before a LoRA")
        checked[name] = fitted(factors, tuple(weight.shape))
        if checked[name] is None:
            raise LoRAError(
                f"{path} does not fit this model: {name} has weight {tuple(weight.shape)}, "
                f"the file's factors are A {tuple(factors.lora_A.shape)} and B {tuple(factors.lora_B.shape)}"
            )
        if not factors.is_finite():
            raise LoRAError(f"{path}: the factors of {name} are not finite")
        if adapter_name not in getattr(layer, "adapters", ()) or _changes(layer, adapter_name):
            check_adapter(model, name, factors.rank, 0.0, adapter_name)
    for name, layer in lora_layers(model):
        if adapter_name in layer.adapters and name not in modules and _changes(layer, adapter_name):
            check_adapter(model, name, layer.adapters[adapter_name].rank, 0.0, adapter_name)  # raises: it is taken
    if not any(f.lora_B.any() or f.magnitude is not None for f in checked.values()):
        raise LoRAError(f"{path}: every lora_B is zero, so it would change nothing")
    return checked


def _changes(layer: LoRALayer, adapter_name: str) -> bool:
    """Whether an adapter changes its weight by more than the rounding of an init whose first factors cancel."""
    return bool(layer.delta(adapter_name).norm() > 1e-6 * layer.weight.float().norm())


@torch.no_grad()
def _report(model: nn.Module, modules: list[str], adapter_name: str, **said: Any) -> LoadReport:
    layers: list[LoRALayer] = [model.get_submodule(name) for name in modules]
    deltas = torch.stack([layer.delta(adapter_name).square().sum() for layer in layers])
    weights = torch.stack([layer.weight.float().square().sum() for layer in layers])
    settings = [layer.adapters[adapter_name] for layer in layers]
    missing = [n for n, layer in lora_layers(model) if adapter_name in layer.adapters and n not in modules]
    scalings = sorted({s.scaling for s in settings})
    relative_delta = float((deltas.sum() / weights.sum()).sqrt())
    return LoadReport(modules, missing, settings[0].scale, scalings, relative_delta, **said)
