"""A checkpoint's file -> the model that it is of, with its weights; the tensors are mapped, and no more than once in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from xdiffusion.build import SCHEMA, build_model, image_shape, load_config
from xdiffusion.checkpoints.files import CheckpointError
from xdiffusion.checkpoints.native import ModelFile, load_model_file
from xdiffusion.config import resolve, without_unknown
from xdiffusion.config_files import ConfigError, from_mapping
from xdiffusion.model import DiffusionModel

RECORDS = ("training", "optimizer", "checkpoints", "cache", "clip", "lora")  # sections that say how a model was made
STABLE_DIFFUSION = Path(__file__).resolve().parent / "configs/image/sd"  # the built-in configs; in a wheel too


def load_model(path: str | Path, config_path: str | Path | None = None) -> tuple[DiffusionModel, DictConfig]:
    """A trained model in evaluation mode, and its config.

    Args:
        path: a checkpoint of `training/image/train.py`, which carries its config; or Stable Diffusion 1.5 or 2.1, as an
            original file or a folder of diffusers, whose config is the built-in one of its shapes.
        config_path: checked against the checkpoint's config; needed for a file that carries none (`.pt`).

    Raises:
        CheckpointError: if the file is missing, damaged, or of another architecture than the config.
        ConfigError: if there is no config at all, or it is wrong.
    """
    file = load_model_file(Path(path))
    config = config_of(file, config_path)
    with _named(config_path if file.config is None and config_path else path):
        model = build_model(config, without_weights=True)
    load_weights(model, file)
    return model.eval().requires_grad_(False), config


def config_of(file: ModelFile, config_path: str | Path | None = None) -> DictConfig:
    """The config of a checkpoint: its own, else the one that is named, else the built-in one of its shapes.

    Raises:
        CheckpointError: if its own config and the one named differ in the architecture.
        ConfigError: if there is no config at all, or it is wrong.
    """
    if file.config is not None:
        config = _own_config(file)
        if config_path is not None:
            check_same_architecture(load_config(config_path), file)
        return config
    if config_path is not None:
        return load_config(config_path)
    if file.architecture is None:
        raise ConfigError(f"{file.path} carries no config: name it with --config_path")
    for note in file.notes:
        print(note, file=sys.stderr)
    return load_config(STABLE_DIFFUSION / f"{file.architecture}.yaml")


def _own_config(file: ModelFile) -> DictConfig:
    """What a model's file says of it.

    Raises:
        CheckpointError, ConfigError: if it is wrong, or its header says another thing.
    """
    config = stored_config(file.config, file.path)
    with _named(file.path):
        shape = image_shape(config)
    if file.image_shape and file.image_shape != shape:
        raise CheckpointError(f"{file.path}: its header is that of images {file.image_shape}, its config of {shape}")
    return config


def stored_config(content: Mapping[str, Any], path: Path) -> DictConfig:
    """The config in a file's header, with the defaults of keys that are younger than the file.

    Raises:
        ConfigError: if it is wrong.
    """
    return resolve(from_mapping(without_unknown(content, SCHEMA, RECORDS), str(path)), SCHEMA, str(path))


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """A mistake in a config that a file holds is a mistake in this file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_fits(file: ModelFile, config: DictConfig) -> None:
    """See that a file's tensors are those of the config's model, without reading them.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    load_weights(
        build_model(config, without_weights=True),
        replace(file, tensors={name: tensor.to("meta") for name, tensor in file.tensors.items()}),
    )


def load_weights(model: DiffusionModel, file: ModelFile) -> None:
    """Put a checkpoint's weights into a model of its architecture, in the model's dtype.

    A model without weights takes the mapped tensors of the file over, each converted where dtype or memory layout differ,
    so that nothing is held twice.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    own = model.state_dict()
    without_weights = any(tensor.is_meta for tensor in own.values())
    tensors = file.tensors
    if without_weights:
        for name in own.keys() & tensors.keys():
            tensors[name] = _fitted(tensors[name], own[name])
    try:
        model.load_state_dict(tensors, assign=without_weights)
    except RuntimeError as error:
        reason = shorten(str(error), 300, placeholder="...")
        raise CheckpointError(f"{file.path} is a checkpoint for another architecture: {reason}") from error


def _fitted(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor in the dtype and memory layout of the model's own, which is on the meta device; a copy only if need be."""
    if tensor.shape != own.shape or (tensor.dtype == own.dtype and tensor.stride() == own.stride()):
        return tensor
    return torch.empty_like(own, device=tensor.device).copy_(tensor)


def check_same_architecture(config: DictConfig, file: ModelFile) -> None:
    """Compare what a config and a checkpoint say of the model, where the checkpoint says anything.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    stored = stored_config(file.config, file.path) if file.config else config
    for key in (
        "model.network",
        "model.text_encoder",
        "model.autoencoder",
        "diffusion.schedule",
        "diffusion.prediction",
    ):
        ours, theirs = (OmegaConf.select(c, key) for c in (config, stored))
        differing = _first_difference(ours, theirs, key)
        if differing:
            raise CheckpointError(f"{file.path} is a checkpoint for another architecture: {differing}")
    if file.image_shape and file.image_shape != image_shape(config):
        raise CheckpointError(f"{file.path} is for images {file.image_shape}, the config for {image_shape(config)}")


def _first_difference(ours: Any, theirs: Any, key: str) -> str:
    if not isinstance(ours, DictConfig):
        return "" if ours == theirs else f"{key}={theirs} there, {ours} in the config"
    keys = (k for k in ours if k != "pretrained")
    return next(filter(None, (_first_difference(ours[k], theirs.get(k), f"{key}.{k}") for k in keys)), "")
