"""Folding a LoRA into a model as `lora apply` and `lora_add` do it: into its own base, with its learned words beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from xdiffusion.as_trained import as_trained
from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import save_tokens_beside, tokens_path
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.paths import refuse_leftover, weights_file
from xdiffusion.commands.base_weights import BaseModel, fold, fold_into, header_as_trained, words_inside
from xdiffusion.commands.lora_files import progress
from xdiffusion.commands.sd_files import write_model
from xdiffusion.loading import check_weights_fit, config_of
from xdiffusion.lora.base_identity import check_base
from xdiffusion.lora.merge import joined_tokens


def fold_as_it_is(base: BaseModel, lora: LoRAFile, scale: float, output: Path, *, allow_other_base: bool) -> None:
    """Write a base with a LoRA folded in, in the form that it has, and tell so.

    Raises:
        ValueError: if the LoRA was trained on another base, and that is not allowed; see `header_as_trained`, `fold`; if a
            tokens file stands where it would be taken for the output's.
    """
    if lora.base_hash and not allow_other_base:
        _check_base(lora, base.files, content_hash(base.files[0]) if base.ours else None, base.path)

    def write() -> str:
        folded = [*filter(None, [base.files[0].metadata.get("folded_lora")]), f"{lora.path.name}:{scale:g}"]
        note = {"folded_lora": ", ".join(folded)} | header_as_trained(base, lora)
        count = fold(base, lora, scale, output, note, progress("folding"))
        return _told(base.path, lora, scale, output, count)

    write_with_words(base.path, [(lora.path, lora.tokens)], output, write, inside=words_inside(base))


def fold_into_original(path: Path, lora: LoRAFile, scale: float, output: Path, *, allow_other_base: bool) -> None:
    """Write Stable Diffusion with a LoRA folded in as its original single file, and tell so.

    Raises:
        ValueError: if there is no such model; see `fold_into`, `write_model`; see `fold_as_it_is` for the rest.
    """
    file = load_model_file(weights_file(path))
    config = config_of(file)
    check_weights_fit(file, config)
    if lora.base_hash and not allow_other_base:
        _check_base(lora, [file.tensors], content_hash(file.tensors, torch.float32), file.path)

    def write() -> str:
        count = fold_into(file, lora, scale)
        write_model(file, as_trained(config, [lora.path]), output, "original")
        return _told(file.path, lora, scale, output, count)

    write_with_words(file.path, [(file.path, file.words), (lora.path, lora.tokens)], output, write)


def _told(base: Path, lora: LoRAFile, scale: float, output: Path, count: int) -> str:
    return f"{output}: {base} + {scale:g} * {lora.path}, {count} layers"


def _check_base(lora: LoRAFile, files: Sequence[Mapping[str, Tensor]], base_hash: str | None, path: Path) -> None:
    """`check_base`, by the base's files; its hash is None where their names are of another tool, so that no hash is known."""
    adapted = {exchange_name(name) for name in lora.modules}
    layers = {n.removesuffix(".weight"): file for file in files for n in file if n.endswith(".weight")}
    weights = {n: file[f"{n}.weight"] for n, file in layers.items() if exchange_name(n) in adapted}
    other_form = check_base(lora, base_hash or str(path), weights, lora.path)
    if other_form and base_hash:
        print(f"{lora.path}: {other_form}", file=sys.stderr)


def write_with_words(
    base: Path,
    added: Sequence[tuple[Path, Mapping[str, Tensor]]],
    output: Path,
    write: Callable[[], str],
    inside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a model, which returns a line to print, and the learned words beside it, which no file of a model has a place for.

    Args:
        base: the words beside it, of a LoRA that was folded into it before, are written first.
        added: further words, by the path that they are of.
        output: of the model.
        write: is called if nothing stands in the way.
        inside: words that the output has in itself, and that no other may be called by.

    Raises:
        ValueError: if a tokens file stands where it would be taken for the output's.
    """
    beside = tokens_path(base)
    earlier = read_learned_tokens(beside) if beside.is_file() else {}
    sources = ((base, inside), (beside, earlier), *added)
    words, renamed = joined_tokens([(source, held) for source, held in sources if held])
    words = {name: rows for name, rows in words.items() if name not in inside}
    if not words:
        refuse_leftover(tokens_path(output))
    print(write())
    if words:
        path = save_tokens_beside(output, words)
        print(f"{path}: {len(words)} learned words, {', '.join(words)}; sample.py takes them as --learned_tokens {path}")
    for line in renamed:
        print(f"{path}: {line}", file=sys.stderr)
