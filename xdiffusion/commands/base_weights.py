"""The model that a LoRA is for, as weight files of any size: folding a LoRA in, and the difference of two models.

A model is a checkpoint of ours, a UNet of diffusers (one safetensors file), or a folder of diffusers with `unet/` and
`text_encoder/`. A LoRA's names and a model's meet in the spelling of the exchange formats.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from xdiffusion.as_trained import as_trained
from xdiffusion.checkpoints.added_words import added_words
from xdiffusion.checkpoints.component_names import COMPONENTS, component_of, exchange_name
from xdiffusion.checkpoints.diffusers_folder import read_settings, weight_file
from xdiffusion.checkpoints.diffusers_settings import VOCABULARY, config_from
from xdiffusion.checkpoints.drawing_settings import drawn_by, drawn_otherwise
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import unsaid
from xdiffusion.checkpoints.native import MODEL_FORMAT, ModelFile, load_model_file, reading_header
from xdiffusion.checkpoints.paths import PICKLED, SAFETENSORS, is_pipeline_folder, weights_file
from xdiffusion.checkpoints.streaming import StoredTensors, copy_safetensors
from xdiffusion.checkpoints.weight_index import open_shards
from xdiffusion.checkpoints.writing import new_folder
from xdiffusion.loading import config_of, stored_config
from xdiffusion.lora.functional import dora_weight, merged_weight
from xdiffusion.lora.settings import LoRAError

_TABLE = "token_embedding.weight"
TEXT_LAYERS = "text_encoder.text_model.encoder.layers."
OF_ANY_TOOL = (SAFETENSORS, *PICKLED, ".msgpack", ".h5", ".onnx")  # endings of weight files
Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class BaseModel:
    """A model's weight files.

    path: what was opened, a file or a folder.
    files: one of ours, or those of diffusers' components.
    ours: whether it is a checkpoint of this project.
    pickled: those of the components whose weights are not in `files`, since they cannot be read layer by layer.
    """

    path: Path
    files: Sequence[StoredTensors]
    ours: bool
    pickled: Sequence[Path] = ()

    def layers(self) -> dict[str, tuple[int, ...]]:
        """The weight shapes of the linear layers and convolutions, by exchange name: what a LoRA can change."""
        return _layers({name: file.shape(name) for file in self.files for name in file})

    def config(self) -> Mapping[str, Any] | None:
        """What a header of ours holds; None in any other file.

        Raises:
            CheckpointError: if it is damaged.
        """
        with reading_header(self.path):
            config = json.loads(self.files[0].metadata.get("config", "null")) if self.ours else None
            if not isinstance(config, dict | None):
                raise TypeError(f"config={config!r:.100}")
        return config or None


def open_base(path: Path) -> BaseModel:
    """Find out what stands at a path.

    Raises:
        CheckpointError: if it is none of the models above.
    """
    if path.is_dir():
        return _open_folder(path)
    path = weights_file(path)
    if path.suffix != SAFETENSORS:
        raise _is_pickled(path)
    file = StoredTensors(path)
    ours = file.metadata.get("format") == MODEL_FORMAT
    if not ours and not {"conv_in.weight", "time_embedding.linear_1.weight"} <= file.keys():
        raise CheckpointError(
            f"{path} is neither a model of this project nor a UNet with diffusers' names; Stable Diffusion's own files are "
            "read by lora_add --mode upl-ckpt-v2, and converted by sd convert"
        )
    return BaseModel(path, [file], ours)


def config_and_words(base: BaseModel) -> tuple[Mapping[str, Any] | None, Mapping[str, Tensor]]:
    """How a model is drawn, as a resolved config, and the learned words that are in it.

    The config is of a checkpoint of ours its header's, of a pipeline's folder its settings'.

    Raises:
        CheckpointError, ConfigError: if it says what cannot be.
    """
    if base.ours or not is_pipeline_folder(base.path):
        return base.config(), {}
    file = load_model_file(base.path)
    return OmegaConf.to_container(config_of(file)), file.words


def words_inside(base: BaseModel) -> Mapping[str, Tensor]:
    """The words in the vocabulary of a pipeline's folder, of which nothing but the text encoder's table is read.

    Raises:
        CheckpointError: if the tokenizer's files are damaged.
    """
    tables = (file[name] for file in base.files for name in file if name.endswith(_TABLE) and not base.ours)
    return next((added_words(base.path / "tokenizer", table) for table in tables), {})


def header_as_trained(base: BaseModel, lora: LoRAFile) -> dict[str, str]:
    """The header's entry `config` of a base with a LoRA folded in, where drawing as the LoRA was trained changes it.

    A UNet alone, and a file without a config, do not say how they are drawn: what the LoRA says is told on stderr.

    Raises:
        CheckpointError: if the base is a folder of diffusers whose settings, which stay, say another thing than the LoRA.
        ConfigError: if what a header says cannot be.
    """
    if not lora.config:
        return {}
    said = base.config() if base.ours else _said_by_folder(base)
    if said and base.ours:
        config = stored_config(said, base.path)
        trained = as_trained(config, [lora.path])
        if drawn_by(trained) == drawn_by(config):
            return {}
        return {"config": json.dumps(OmegaConf.to_container(trained), separators=(",", ":"))}
    if said:
        for key, theirs, ours in drawn_otherwise(said, lora.config):
            raise CheckpointError(
                f"{lora.path} was trained with {key}={ours!s:.100}, {base.path} says {theirs}, and so would the output; "
                "lora_add --mode upl-ckpt-v2 writes a file that says what the LoRA does"
            )
    elif lost := unsaid(lora, "diffusers"):
        print(f"{lora.path} was trained with {', '.join(lost)}, which the output does not say", file=sys.stderr)
    return {}


def fold(
    base: BaseModel, lora: LoRAFile, scale: float, output: Path, metadata: Mapping[str, str], progress: Progress = iter
) -> int:
    """Write base with W + scale * delta in place of W; one layer at a time, so in the memory of the largest.

    Args:
        base: whose dtypes the result keeps; sums are taken in float32.
        lora: every module of it must fit; those of a component that the base does not hold are left out, with a note.
        scale: strength, 1 as trained.
        output: a file, or a folder where the base is one.
        metadata: added to the header of each file.
        progress: wrapped around each file's tensor names.

    Returns:
        The number of layers that took an update.

    Raises:
        LoRAError: if a module does not fit, or the LoRA would change nothing.
        CheckpointError: if the output cannot be written, or is a folder that is there already, or a component that the LoRA
            changes is pickled.
    """
    changed = {component_of(exchange_name(name)) for name in lora.modules}
    for path in base.pickled:
        if path.parent.name in changed:
            raise _is_pickled(path)
    fitting = _fitting(base.layers(), base.path, lora)

    def change(name: str, weight: Tensor) -> Tensor:
        factors = fitting.get(exchange_name(name.removesuffix(".weight"))) if name.endswith(".weight") else None
        return weight if factors is None else folded_weight(weight, factors, scale)

    if not base.path.is_dir():
        if output.suffix in PICKLED:
            raise CheckpointError(f"{output}: the result is a {SAFETENSORS} file; name such a one")
        copy_safetensors(base.files[0], output, change, {**base.files[0].metadata, **metadata}, progress)
        return len(fitting)
    with new_folder(output) as copy:
        weights = _weights_to_replace(base)
        shutil.copytree(base.path, copy, ignore=lambda folder, names: [n for n in names if Path(folder, n) in weights])
        for file in base.files:
            path = copy / file.path.relative_to(base.path)
            copy_safetensors(file, path, change, {**file.metadata, **metadata}, progress)
    if left := sorted(weights - {file.path for file in base.files}):
        names = ", ".join(str(path.relative_to(base.path)) for path in left)
        print(f"not copied to {output}, since the LoRA is not in them: {names}", file=sys.stderr)
    return len(fitting)


def fold_into(file: ModelFile, lora: LoRAFile, scale: float) -> int:
    """As `fold`, into a model that is open: its changed tensors are replaced, one after another.

    Returns:
        The number of layers that took an update.

    Raises:
        LoRAError: see `fold`.
    """
    fitting = _fitting(_layers({n: tuple(tensor.shape) for n, tensor in file.tensors.items()}), file.path, lora)
    for name, weight in file.tensors.items():
        if name.endswith(".weight") and (factors := fitting.get(exchange_name(name.removesuffix(".weight")))):
            file.tensors[name] = folded_weight(weight, factors, scale)
    return len(fitting)


def folded_weight(weight: Tensor, factors: LoRAFactors, scale: float) -> Tensor:
    """W + scale * delta in W's dtype and shape, computed in float32."""
    lora_A, lora_B = factors.lora_A.float(), factors.lora_B.float()
    if factors.magnitude is None:
        return merged_weight(weight, lora_A, lora_B, scale * factors.scaling)
    exact = weight.float()
    styled = dora_weight(exact, exact, lora_A, lora_B, factors.scaling, factors.magnitude.float())
    return exact.lerp(styled, scale).to(weight.dtype)


def weight_differences(tuned: BaseModel, base: BaseModel, progress: Progress = iter) -> Iterator[tuple[str, Tensor]]:
    """(name in the base's file, tuned - base in float32) of every tensor that differs, one after another.

    Versions of transformers name a text encoder's tensors with `text_model.` or without, and keep a table of positions or not.

    Raises:
        CheckpointError: if the models have different tensors, or differ by numbers that are not finite, or a part is pickled.
    """
    for path in (*tuned.pickled, *base.pickled):
        raise _is_pickled(path)
    theirs, ours = map(_by_common_name, (tuned, base))
    shapes = [{common: _shape(file, name) for common, (file, name) in model.items()} for model in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{tuned.path} and {base.path} are models of different parts or architectures")
    for common in progress(ours):
        (their_file, their_name), (file, name) = theirs[common], ours[common]
        their_weight, weight = their_file[their_name], file[name]
        if common.endswith(_TABLE):
            their_weight, weight = their_weight[:VOCABULARY], weight[:VOCABULARY]
        delta = their_weight.float() - weight.float()
        if not delta.isfinite().all():
            raise CheckpointError(f"{name} of {tuned.path} and {base.path} does not differ by finite numbers")
        if delta.any():
            yield name, delta


def _shape(file: StoredTensors, name: str) -> tuple[int, ...]:
    """Of a tensor; a text encoder's table is counted without the words that were added to it."""
    rows, *rest = file.shape(name) or (0,)
    return (min(rows, VOCABULARY) if name.endswith(_TABLE) else rows, *rest)


def _by_common_name(model: BaseModel) -> dict[str, tuple[StoredTensors, str]]:
    """(its file, its name there) of every weight, by a name that is the same whoever wrote the file."""
    named = ((name.removeprefix("text_model."), file, name) for file in model.files for name in file)
    return {common: (file, name) for common, file, name in named if common != "embeddings.position_ids"}


def _said_by_folder(base: BaseModel) -> Mapping[str, Any]:
    """What the settings of a folder of diffusers say of how to draw; nothing if there are none."""
    settings = read_settings(base.path) if base.path.is_dir() else {}
    layers = {name.split(".")[4] for name in base.layers() if name.startswith(TEXT_LAYERS)}
    read = ("scheduler/", "text_encoder/") if layers else ("scheduler/",)
    try:
        said = config_from({name: one for name, one in settings.items() if name.startswith(read)}, len(layers))
    except ValueError as error:
        raise CheckpointError(f"{base.path}/{error}") from error
    return said if drawn_by(said) else {}


def _open_folder(folder: Path) -> BaseModel:
    """A diffusers pipeline, or a UNet's folder alone, by those of its weight files that are read when it is drawn with."""
    parts = [folder / component for component in COMPONENTS if (folder / component).is_dir()]
    if not parts and any(folder.glob("diffusion_pytorch_model*")):
        parts = [folder]
    if not parts:
        raise CheckpointError(f"{folder} holds no unet/, and no diffusion_pytorch_model.* as the folder of a UNet alone does")
    files, pickled = [], []
    for path in map(weight_file, parts):
        if ".bin" in path.suffixes:
            pickled.append(path)
        elif path.suffix == ".json":
            files += open_shards(path)[1].values()
        else:
            files.append(StoredTensors(path))
    if not files:
        raise _is_pickled(pickled[0])
    return BaseModel(folder, files, ours=False, pickled=pickled)


def _is_pickled(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is pickled, and only safetensors files can be read layer by layer; sd convert makes such of a whole model"
    )


def _weights_to_replace(base: BaseModel) -> set[Path]:
    """The weight files of a folder that its copy must not have: what is written anew, and any other that might be loaded
    in its place, of the same component or of the whole model."""
    parts = {file.path.parent for file in base.files}
    read = {weight_file(part) for part in parts}
    there = [path for folder in {base.path, *parts} for path in folder.iterdir() if path.is_file()]
    indexes = {path for path in there if ".index." in path.name}
    return {path for path in there if path.suffix in OF_ANY_TOOL} | (indexes - read)


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of all tensors' shapes, those of the weights of linear layers and convolutions, by exchange name."""
    return {
        exchange_name(name.removesuffix(".weight")): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 3, 4) and not name.endswith("embedding.weight")
    }


def _fitting(shapes: Mapping[str, tuple[int, ...]], path: Path, lora: LoRAFile) -> dict[str, LoRAFactors]:
    """Factors by exchange name; the modules of components that the base at `path` does not hold are told on stderr."""
    present = {component_of(name) for name in shapes}
    modules = {exchange_name(name): factors for name, factors in lora.modules.items()}
    left_out = [name for name in modules if component_of(name) and component_of(name) not in present]
    fitting = {name: factors for name, factors in modules.items() if name not in left_out}
    for name, factors in fitting.items():
        update = (factors.lora_B.shape[0], factors.lora_A[0].numel())
        if name not in shapes or (shapes[name][0], math.prod(shapes[name][1:])) != update:
            there = f"has weight {shapes[name]}" if name in shapes else "is not there"
            raise LoRAError(f"the LoRA does not fit {path}: {name} {there}, its update is {update}")
        if not factors.is_finite():
            raise LoRAError(f"the factors of {name} are not finite")
    if not any((f.lora_B.any() and f.lora_A.any()) or f.magnitude is not None for f in fitting.values()):
        raise LoRAError(f"the LoRA would change nothing in {path}")
    if left_out:
        print(f"{len(left_out)} modules of the {component_of(left_out[0])} left out: not in {path}", file=sys.stderr)
    return fitting
