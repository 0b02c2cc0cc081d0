"""A checkpoint's file -> the model that it is of, with its weights; the tensors are mapped, and no more than once in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from xdiffusion.build import SCHEMA, build_model, image_shape, load_config, resolved, written_config
from xdiffusion.checkpoints.drawing_settings import DRAWN_BY, PROCESS
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.native import ModelFile, load_model_file
from xdiffusion.checkpoints.paths import weights_file
from xdiffusion.checkpoints.stable_diffusion_files import StableDiffusionFile, part_alone
from xdiffusion.config import with_overrides, without_unknown
from xdiffusion.config_files import ConfigError, check_values
from xdiffusion.model import DiffusionModel

RECORDS = ("training", "optimizer", "checkpoints", "cache", "clip", "lora")  # sections that say how a model was made
STABLE_DIFFUSION = Path(__file__).resolve().parent / "configs/image/sd"  # the built-in configs; in a wheel too
ARCHITECTURE = ("model.network", "model.text_encoder", "model.autoencoder")
CHOICES = (*DRAWN_BY, "data.image_size")  # in which a run may differ from its base
PARTS = {"network": "UNet", "text_encoder": "text encoder", "autoencoder": "autoencoder"}
TO_TAKE = "take a whole checkpoint, or a folder of diffusers"  # in place of a file that lacks parts
BEGUN_WITH = "pretrained"  # of the text encoder; says nothing of weights that are there


def load_model(
    path: str | Path,
    config_path: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    ema: bool | None = None,
) -> tuple[DiffusionModel, DictConfig]:
    """A trained model in evaluation mode, and its config.

    Args:
        path: a checkpoint of `training/image/train.py`, which carries its config; or Stable Diffusion 1.5 or 2.1, as an
            original file or a folder of diffusers, whose config is the built-in one of its shapes with what the file says.
        config_path: must be of the checkpoint's model, and its section sampling: is used; needed for a file that carries no
            config (`.pt`), and in the place of what a file of Stable Diffusion says.
        dtype: of the network and the text encoder, float32 by default. In the file's own, its tensors are taken over as
            they are; the autoencoder is always in float32.
        ema: see `read_stable_diffusion`.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another architecture than the config.
        ConfigError: if there is no config at all, or it is wrong.
    """
    file = load_model_file(Path(path), ema)
    config = config_of(file, config_path)
    with in_file(config_path if file.config is None and config_path else path):
        model = build_model(config, without_weights=True)
    model.set_precision(dtype)
    load_weights(model, file)
    if file.words:
        _add_words(model, file)
    return model.eval().requires_grad_(False), config


def _add_words(model: DiffusionModel, file: ModelFile) -> None:
    """Give the text encoder the words that a pipeline's folder was saved with, and say which."""
    try:
        model.text_encoder.add_tokens(file.words)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    to_stderr(f"{file.path} has words of its own: {', '.join(file.words)}")


def config_of(file: ModelFile, config_path: str | Path | None = None) -> DictConfig:
    """The config of a checkpoint: its own, else the one that is named, else what a file of Stable Diffusion says.

    On its own the section sampling: of the one that is named is laid. What of a file of Stable Diffusion was assumed, and
    what is not as the built-in config has it, is told on stderr.

    Raises:
        CheckpointError: if its own config and the one named differ in what makes the model.
        ConfigError: if there is no config at all, or it is wrong.
    """
    own, given = own_config(file), load_config(config_path) if config_path is not None else None
    if file.config and given is not None:
        check_same_architecture(given, file)
        for choice in choices_of_run(given, file):
            raise CheckpointError(f"{file.path} is a model of other settings: {choice}")
        return _sampled_as(own, config_path)
    if own is None and given is None:
        if alone := part_alone(file.tensors):
            raise CheckpointError(f"{file.path} is {alone} alone; {TO_TAKE}")
        raise ConfigError(f"{file.path} carries no config: name it with --config_path")
    if file.stable_diffusion is not None and given is None:
        for note in (*file.stable_diffusion.notes, *_remarks(file.path, file.stable_diffusion, own)):
            to_stderr(note)
    return own if given is None else given


def _sampled_as(config: DictConfig, config_path: str | Path) -> DictConfig:
    """A checkpoint's config with the section sampling: of a YAML on top; what this changes is told on stderr."""
    section = {key: value for key, value in written_config(config_path).items() if key == "sampling"}
    chosen = resolved(with_overrides(config, section, SCHEMA), str(config_path))
    changed = [f"{key}={theirs} ({ours} there)" for key, ours, theirs in config_differences(config, chosen, ["sampling"])]
    if changed:
        to_stderr(f"{config_path} beats the checkpoint: {', '.join(changed)}")
    return chosen


def own_config(file: ModelFile) -> DictConfig | None:
    """What a file says of its model.

    Raises:
        CheckpointError, ConfigError: if it is wrong, or its header says another thing.
    """
    if not file.config:
        return stable_diffusion_config(file.stable_diffusion, str(file.path)) if file.stable_diffusion else None
    config = stored_config(file.config, file.path)
    with in_file(file.path):
        shape = image_shape(config)
    if file.image_shape and file.image_shape != shape:
        raise CheckpointError(f"{file.path}: its header is that of images {file.image_shape}, its config of {shape}")
    return config


def stored_config(content: Mapping[str, Any], path: Path) -> DictConfig:
    """The config in a file's header, with the defaults of keys that are younger than the file.

    Raises:
        ConfigError: if it is wrong.
    """
    known = without_unknown(content, SCHEMA, RECORDS)
    check_values(known, str(path))
    return resolved(known, str(path))


@contextmanager
def in_file(path: str | Path) -> Iterator[None]:
    """A mistake in a config that a file holds is a mistake in this file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def stable_diffusion_config(found: StableDiffusionFile, source: str) -> DictConfig:
    """The built-in config of a file's shapes, with what the file says on top; `source` is named in errors.

    Raises:
        ConfigError: if the file says what no config allows.
    """
    built_in = load_config(STABLE_DIFFUSION / f"{found.architecture}.yaml")
    check_values(found.said, source)
    return resolved(with_overrides(built_in, found.said, SCHEMA), source)


def _remarks(path: Path, found: StableDiffusionFile, config: DictConfig) -> Iterator[str]:
    """What a user should know of what a file was taken to be."""
    prediction = config.diffusion.prediction
    if found.guessed:
        names = ("sd21_v", "sd21_base") if found.architecture.startswith("sd21") else ("sd15", "sd15")
        other = STABLE_DIFFUSION / f"{names[prediction == 'v']}{'_tiny' * found.architecture.endswith('_tiny')}.yaml"
        yield f"{path} is taken to predict {prediction}, by its name; if not, --config_path {_shown(other)}"
    drawn_by = (*DRAWN_BY, "model.text_encoder.pad_with_end_token", "model.autoencoder.scale_factor")
    keys = [key for key in drawn_by if key != found.guessed]
    built_in = load_config(STABLE_DIFFUSION / f"{found.architecture}.yaml")
    said = [f"{key}={theirs}" for key, _, theirs in config_differences(built_in, config, keys)]
    if said:
        yield f"{path} says {', '.join(said)}"


def _shown(path: Path) -> Path:
    """A built-in config's path, as short as it can be typed."""
    in_repository = Path("configs/image/sd") / path.name
    return in_repository if in_repository.is_file() else path


def check_weights_fit(file: ModelFile, config: DictConfig) -> None:
    """See that a file's tensors are those of the config's model, without reading them.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    load_weights(
        build_model(config, without_weights=True),
        replace(file, tensors={name: tensor.to("meta") for name, tensor in file.tensors.items()}),
    )


def load_weights(model: DiffusionModel, file: ModelFile, *, mapped: bool = True) -> None:
    """Put a checkpoint's weights into a model of its architecture, in the model's dtype.

    Args:
        model: one without weights takes the mapped tensors of the file over, each converted where dtype or memory layout
            differ, so that nothing is held twice.
        mapped: False makes it take copies, which stay what they are whatever becomes of the file.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    own = model.state_dict()
    without_weights = any(tensor.is_meta for tensor in own.values())
    tensors = file.tensors
    misfits = list(_misfits(own, tensors))
    if misfits:
        raise CheckpointError(
            _incomplete(file, own)
            or f"{_other(file)}: {misfits[0]}" + (f", and {len(misfits) - 1} more" if len(misfits) > 1 else "")
        )
    if without_weights:
        for name in own:
            tensors[name] = _fitted(tensors[name], own[name], mapped)
    model.load_state_dict(tensors, assign=without_weights)


def _misfits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What does not go together, tensor by tensor."""
    for name, tensor in own.items():
        if name not in tensors:
            yield f"{name} is missing there"
        elif tensors[name].shape != tensor.shape:
            yield f"{name} is {tuple(tensors[name].shape)} there, {tuple(tensor.shape)} by the config"
    yield from (f"{name:.100} is there, and not by the config" for name in tensors if name not in own)


def _incomplete(file: ModelFile, own: Mapping[str, Tensor]) -> str:
    """The error for a file that holds some parts of its model whole, and others not at all; "" for any other."""
    if alone := part_alone(file.tensors):
        return f"{file.path} is {alone} alone; {TO_TAKE}"
    needed, there, differing = (
        {name.partition(".")[0] for name in names} for names in (own, file.tensors, own.keys() ^ file.tensors.keys())
    )
    missing = [word for part, word in PARTS.items() if part in needed - there]
    only_these = missing and there and len(differing) == len(missing)
    return f"{file.path} holds no {' and no '.join(missing)}; {TO_TAKE}" if only_these else ""


def _other(file: ModelFile) -> str:
    """The beginning of an error: what the file is, where that is known."""
    if file.stable_diffusion is None:
        return f"{file.path} is a checkpoint for another architecture"
    found = file.stable_diffusion.architecture
    return f"{file.path} is {found} by its first layers; it is damaged, or the config is for another architecture"


def _fitted(tensor: Tensor, own: Tensor, mapped: bool) -> Tensor:
    """A tensor in the dtype and memory layout of the model's own, which is on the meta device; if it may stay mapped, a copy
    only if need be."""
    if mapped and tensor.dtype == own.dtype and tensor.stride() == own.stride():
        return tensor
    # `empty_like` of a meta tensor would load torch's symbolic shapes, a third of a second
    return torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=tensor.device).copy_(tensor)


def check_same_architecture(config: DictConfig, file: ModelFile) -> None:
    """See that a config's model can take a checkpoint's weights: network, text encoder and autoencoder are the same.

    A model of pixels also has to be of the same image size; a latent one, whose network is convolutional, draws any.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    stored = own_config(file)
    if stored is not None:
        for key, ours, theirs in config_differences(config, stored, ARCHITECTURE):
            if key not in CHOICES:
                raise CheckpointError(f"{_other(file)}: {key}={theirs} there, {ours} in the config")
    if file.image_shape:
        of_latents = config.model.autoencoder.kind != "identity"
        theirs, ours = (shape[: 1 if of_latents else 3] for shape in (file.image_shape, image_shape(config)))
        if theirs != ours:
            raise CheckpointError(f"{file.path} is for images {file.image_shape}, the config for {image_shape(config)}")


def choices_of_run(config: DictConfig, file: ModelFile) -> list[str]:
    """In what a config differs from a checkpoint of the same architecture, of what training may change: see `CHOICES`."""
    stored = own_config(file)
    if stored is None:
        return []
    guessed = file.stable_diffusion.guessed if file.stable_diffusion else ""
    found = config_differences(config, stored, CHOICES)
    return [f"{key}={theirs} there, {ours} in the config" for key, ours, theirs in found if key != guessed]


def base_of_run(config: DictConfig, path: str | Path, ema: bool | None, *, lora: bool, says: bool) -> ModelFile:
    """The checkpoint that a run begins with, seen to be of its architecture.

    Args:
        ema: see `read_stable_diffusion`.
        lora: whether a LoRA is trained.
        says: tell on stderr in what the run goes another way.

    Raises:
        CheckpointError: if it is missing, damaged, or of another architecture.
        ValueError: if a learned word alone is to be trained by what the network does not predict.
    """
    file = load_model_file(weights_file(path), ema)
    check_same_architecture(config, file)
    choices = choices_of_run(config, file)
    process = [choice for choice in choices if choice.startswith(PROCESS)]
    if process and "textual_inversion" in config and not lora:
        frozen = "a word alone leaves the network as it is: train it by those of its base, or with --use_lora_training"
        raise ValueError(f"{file.path}: {process[0]}; {frozen}")
    if says:
        for choice in choices:
            to_stderr(f"{file.path}: {choice}, by which this run goes")
        if file.words:
            left_out = f"its words {', '.join(file.words)} are left out: a run has those that it learns"
            to_stderr(f"{file.path}: {left_out}")
    return file


def to_stderr(line: str) -> None:
    """Say something that is no result."""
    print(line, file=sys.stderr)


def config_differences(config: DictConfig, other: DictConfig, keys: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """(key, its value, the other's) of all values below these keys that are not equal."""
    for key in keys:
        yield from _differing(*(OmegaConf.select(c, key) for c in (config, other)), key)


def _differing(ours: Any, theirs: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, DictConfig) and isinstance(theirs, DictConfig):
        if ours.get("kind") != theirs.get("kind"):  # whose other keys then have nothing to do with each other
            ours, theirs = ({"kind": side.get("kind")} for side in (ours, theirs))
        for name in dict.fromkeys([*ours, *theirs]):
            if name != BEGUN_WITH:
                yield from _differing(ours.get(name), theirs.get(name), f"{key}.{name}")
    elif ours != theirs:
        yield key, ours, theirs


def tell_remarks(model: DiffusionModel, config: DictConfig, prompts: Sequence[str]) -> None:
    """Say what the text encoder has to say of prompts that are to be drawn."""
    for remark in model.text_encoder.remarks(prompts, config.sampling.prompt_syntax):
        print(remark, file=sys.stderr)
