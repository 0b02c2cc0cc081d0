"""Files that count layers instead of naming them: cloneofsimo/lora's two kinds, and the flat list of this repository's
ancestor.

    cloneofsimo     safetensors, `unet:<i>:up`, `unet:<i>:down`, learned tokens by name
    cloneofsimo-pt  a pickled list [up0, down0, up1, ...]; the text encoder's in `<name>.text_encoder.pt`, or in
                    `<name>_txt.pt` by the Dreambooth extension of A1111; read as JSON too
    positional      such a list for all layers of any model, in the order of its modules

The place in the file is the place among the layers of one of the sets below, which are these tools' choices of ancestor
classes. Which set it was follows from the number and the shapes of the factors, and only an exact fit is read. A layer of
the set that a LoRA leaves alone gets a pair of zeros of rank 1. The scaling is folded into `up`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdiffusion.checkpoints.component_names import COMPONENTS, component_of
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats.factors import assemble, fitted
from xdiffusion.checkpoints.lora_formats.keys import Loose
from xdiffusion.checkpoints.lora_formats.layer_table import (
    SD_BASES,
    LayerTable,
    Shape,
    in_old_diffusers_order,
    sd_layer_table,
)
from xdiffusion.checkpoints.paths import refuse_leftover
from xdiffusion.checkpoints.reading import load_pickled
from xdiffusion.checkpoints.writing import save_pickled, save_safetensors

_ATTENTION = r".*\.attn[12]\.(to_[qkv]|to_out\.0)"
_GEGLU = rf"{_ATTENTION}|.*\.ff\.net\.0\.proj"
SETS = {  # component -> (ancestor classes, their linear and convolution layers), from the smallest set
    "unet": (
        (("CrossAttention", "Attention"), _ATTENTION),
        (("CrossAttention", "Attention", "GEGLU"), _GEGLU),
        (("CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"), rf"{_GEGLU}|.*\.resnets\.\d+\..*"),
        (("UNet2DConditionModel",), r".*"),
    ),
    "text_encoder": (
        (("CLIPAttention",), r".*\.self_attn\..*"),
        (("CLIPTextModel",), r".*"),
    ),
}
_WALKED = 1  # of the UNet's sets: a pickled list names no classes, and cloneofsimo's own loader goes by this one
LARGEST_JSON = 32 << 20  # bytes; rank 4 for Stable Diffusion takes 18 MB
MOST_NUMBERS, MOST_LISTS = 1 << 22, 1 << 19  # in it, of which Python holds each; that one has 797,184 and 100,000
Pairs = Sequence[tuple[Tensor, Tensor]]  # of (up, down)


def read_cloneofsimo(loose: Loose, path: Path, names: LayerTable | None) -> dict[str, LoRAFactors]:
    """Factors by exchange name.

    Raises:
        CheckpointError: if an index is missing, or number and shapes fit no set of layers.
    """
    counted: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensors in loose.parts.items():
        component, _, index = key.partition(":")
        counted.setdefault(component, {})[int(index)] = tensors
    modules: dict[str, LoRAFactors] = {}
    for component, parts in counted.items():
        if sorted(parts) != list(range(len(parts))) or component not in COMPONENTS:
            raise CheckpointError(f"{path}: the {len(parts)} layers of {component!r} are not counted from 0 without gap")
        factors = assemble({f"{component}:{i}": parts[i] for i in range(len(parts))}, path, loose.repairs)
        pairs = list(factors.values())
        later = not _fits(pairs, _old_orders(component, names))  # made with a diffusers that came after
        orders = _old_orders(component, names, arrange=list if later else in_old_diffusers_order)
        modules |= _placed(pairs, orders, path, component)
    return modules


def read_list(content: Any, path: Path, names: LayerTable | None) -> tuple[str, dict[str, LoRAFactors], list[str]]:
    """(format, factors by exchange name, repairs) of a pickled list.

    Raises:
        CheckpointError: if it is no list of pairs, or number and shapes fit no set of layers.
    """
    repairs: list[str] = []
    text_path = next(filter(Path.is_file, _text_files(path)), None)
    factors = _pairs(content, path, repairs)
    if text_path:
        text = _pairs(load_pickled(text_path), text_path, repairs)
        modules = _placed(factors, _old_orders("unet", names), path, "the UNet") if factors else {}
        modules |= _placed(text, _old_orders("text_encoder", names), text_path, "the text encoder")
        return "cloneofsimo-pt", modules, repairs
    tables = [names] if names else [sd_layer_table(base) for base in SD_BASES]
    if any(_is_sd(table) for table in tables):  # the list of another model is never cloneofsimo's
        for component in COMPONENTS:
            if _fits(factors, _old_orders(component, names)):
                return "cloneofsimo-pt", _placed(factors, _old_orders(component, names), path, component), repairs
    orders = (order for table in tables for order in _own_orders(table))
    return "positional", _placed(factors, orders, path, "this model" if names else "Stable Diffusion"), repairs


def load_json(path: Path) -> list[Tensor]:
    """The factors of cloneofsimo's JSON: its pickled list, each factor in nested lists of numbers; float32.

    Raises:
        CheckpointError: if it is larger than LARGEST_JSON, holds more than MOST_NUMBERS or MOST_LISTS, or is anything else
            than such a list.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} is larger than {LARGEST_JSON >> 20} MiB, too large for factors in JSON")
    text = path.read_bytes()
    if text.count(b",") >= MOST_NUMBERS or text.count(b"[") + text.count(b"{") > MOST_LISTS:
        raise CheckpointError(f"{path} holds more than {MOST_NUMBERS:,} numbers or {MOST_LISTS:,} lists")
    try:
        return [torch.tensor(factor, dtype=torch.float32) for factor in json.loads(text)]
    except (ValueError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is no JSON list of factors [up0, down0, ...]: {str(error)[:200]}") from error


def write_cloneofsimo(lora: LoRAFile, path: Path, names: LayerTable | None) -> None:
    """Write the safetensors kind; scaling must be folded."""
    tensors: dict[str, Tensor] = dict(lora.tokens)
    header = dict.fromkeys(lora.tokens, "<embed>")
    for component, (classes, pairs) in _in_old_order(lora, names).items():
        header[component] = json.dumps(classes)
        for i, (up, down) in enumerate(pairs):
            tensors[f"{component}:{i}:up"], tensors[f"{component}:{i}:down"] = up, down
            header[f"{component}:{i}:rank"] = str(down.shape[0])
    save_safetensors(path, tensors, header)


def write_cloneofsimo_pt(lora: LoRAFile, path: Path, names: LayerTable | None) -> None:
    """Write the pickled kind, and the text encoder's file beside it; scaling must be folded.

    Raises:
        CheckpointError: for a model other than Stable Diffusion, whose list would be read as a positional one.
    """
    if not _is_sd(names or _sd_table_for(lora)):
        raise CheckpointError("cloneofsimo's list is for Stable Diffusion 1.x and 2.x; the list of a model is `positional`")
    parts, (text_path, other_text_path) = _in_old_order(lora, names, smallest_unet=_WALKED), _text_files(path)
    if "text_encoder" in parts:
        _save_list(parts["text_encoder"][1], text_path)
    else:
        refuse_leftover(text_path)
        refuse_leftover(other_text_path)
    _save_list(parts.get("unet", ((), ()))[1], path)


def write_positional(lora: LoRAFile, path: Path, names: LayerTable | None) -> None:
    """Write the list of the smallest set of layers that has all the modules, in the table's order."""
    table = names or _sd_table_for(lora)
    if stray := _stray(lora, table):
        raise CheckpointError(f"{stray} is no layer of the model: a positional file cannot hold it")
    for order in _own_orders(table):
        pairs = _with_zeros(lora, order)
        fits = _fits([LoRAFactors(down, up, down.shape[0]) for up, down in pairs], _own_orders(table))
        if lora.modules.keys() <= order.keys() and len(fits) == 1:
            break
    else:
        raise CheckpointError("a positional file of this LoRA would fit several sets of the model's layers")
    for text_path in _text_files(path):
        refuse_leftover(text_path)
    _save_list(pairs, path)


def _text_files(path: Path) -> tuple[Path, Path]:
    """Where the text encoder's list may be, beside the UNet's."""
    return path.with_suffix(".text_encoder.pt"), path.with_name(f"{path.stem}_txt.pt")


def _save_list(pairs: Iterable[tuple[Tensor, Tensor]], path: Path) -> None:
    flat = [tensor.detach().clone() for pair in pairs for tensor in pair]
    save_pickled(path, flat)


def _pairs(content: Any, path: Path, repairs: list[str]) -> list[LoRAFactors]:
    """Factors of a flat list [up0, down0, ...] of tensors or Parameters."""
    if not isinstance(content, list) or len(content) % 2 or not all(isinstance(t, Tensor) for t in content):
        raise CheckpointError(f"{path} is no list of pairs of factors [up0, down0, up1, ...]")
    tensors = [t.detach() for t in content]
    parts = {str(i): {"lora_B": up, "lora_A": down} for i, (up, down) in enumerate(zip(tensors[::2], tensors[1::2]))}
    return list(assemble(parts, path, repairs).values())


def _old_orders(
    component: str,
    names: LayerTable | None,
    arrange: Callable[[Iterable[str]], list[str]] = in_old_diffusers_order,
) -> Iterator[dict[str, Shape]]:
    """The sets of a component in the order of the diffusers of cloneofsimo's time, of this model or of Stable Diffusion.

    arrange: another order, of names that stand in the table's.
    """
    part = names.part(component) if names else None
    for table in [part] if part else [sd_layer_table(base).part(component) for base in SD_BASES]:
        for _, pattern in SETS[component]:
            layers = [name for name in table if re.fullmatch(pattern, name)]
            yield {name: table[name] for name in arrange(layers)}


def _own_orders(table: LayerTable) -> Iterator[dict[str, Shape]]:
    """Every choice of sets of the components, then the whole table, in the table's order."""
    choices = []
    for component in COMPONENTS:
        part = table.part(component)
        choices.append([set(), *({name for name in part if re.fullmatch(pattern, name)} for _, pattern in SETS[component])])
    for chosen in product(*choices):
        yield {name: shape for name, shape in table.items() if any(name in names for names in chosen)}
    yield table


def _fits(factors: Sequence[LoRAFactors], orders: Iterable[dict[str, Shape]]) -> list[dict[str, LoRAFactors]]:
    """The factors by the names of every set of layers that they fit, one by one."""
    found = {}
    for order in orders:
        if len(order) == len(factors) > 0 and tuple(order) not in found:
            shaped = [fitted(f, shape) for f, shape in zip(factors, order.values())]
            if all(shaped):
                found[tuple(order)] = dict(zip(order, shaped))
    return list(found.values())


def _placed(
    factors: Sequence[LoRAFactors], orders: Iterable[dict[str, Shape]], path: Path, where: str
) -> dict[str, LoRAFactors]:
    fits = _fits(factors, orders)
    if len(fits) != 1:
        raise CheckpointError(
            f"{path}: its {len(factors)} pairs of factors fit {'several sets' if fits else 'no set'} of layers of {where}, "
            "by number and shapes"
        )
    return {name: f for name, f in fits[0].items() if f.lora_A.any() or f.lora_B.any()}  # zeros stand for no pair


def _is_sd(table: LayerTable) -> bool:
    """Whether a table's UNet is Stable Diffusion's, in any order."""
    return any(table.part("unet") == sd_layer_table(base).part("unet") for base in SD_BASES)


def _sd_table_for(lora: LoRAFile) -> LayerTable:
    for base in SD_BASES:
        table = sd_layer_table(base)
        if all(name in table and fitted(f, table[name]) for name, f in lora.modules.items()):
            return table
    raise CheckpointError(
        "this LoRA is of no Stable Diffusion 1.x or 2.x: formats that count layers need the table of its model's layers"
    )


def _in_old_order(lora: LoRAFile, names: LayerTable | None, smallest_unet: int = 0) -> dict[str, tuple[tuple[str, ...], Pairs]]:
    """component -> (ancestor classes, pairs) of the smallest set that has the component's modules.

    smallest_unet: the place in SETS of the first set that a UNet may have.
    """
    table = names or _sd_table_for(lora)
    stray = _stray(lora, {name: shape for name, shape in table.items() if component_of(name)})
    if stray:
        raise CheckpointError(f"cloneofsimo's formats have no place for {stray}: they count a UNet's and text encoder's")
    result = {}
    for component in COMPONENTS:
        wanted = {name for name in lora.modules if component_of(name) == component}
        if wanted:
            sets = list(zip((classes for classes, _ in SETS[component]), _old_orders(component, table)))
            allowed = sets[smallest_unet:] if component == "unet" else sets
            classes, order = next(found for found in allowed if wanted <= found[1].keys())
            result[component] = classes, _with_zeros(lora, order)
    return result


def _stray(lora: LoRAFile, table: Mapping[str, Shape]) -> str | None:
    return next((name for name in lora.modules if name not in table), None)


def _with_zeros(lora: LoRAFile, order: Mapping[str, Shape]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for name, shape in order.items():
        factors = lora.modules.get(name)
        ones = [1] * (len(shape) - 2)
        zeros = torch.zeros(shape[0], 1, *ones), torch.zeros(1, *shape[1:])
        pairs.append((factors.lora_B, factors.lora_A) if factors else zeros)
    return pairs
