"""The weights file of a step, for each kind of run: a model, an adapter of a frozen one, or the tiny CLIP.

It holds the moving average and is what others read; `state` keeps beside it what resuming needs.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens, save_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.lora_formats.factors import RoundingError
from xdiffusion.checkpoints.native import header, load_model_file, save_model
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.lora.weights import lora_file_of
from xdiffusion.model import DiffusionModel
from xdiffusion.training.exports import export_lora
from xdiffusion.training.sharded_weights import host_copy

CLIP_FORMAT = "xdiffusion-clip"


class WeightsFiles(ABC):
    """How the weights files of a run are named, written and read.

    Args:
        config: resolved; saved in every file.
        base_hash: of the frozen base of an adapter; None of others.

    Attributes:
        prefix, suffix: a step's file is <prefix>-<step><suffix>.safetensors.
        rounds: whether the file holds less than the average: the state has to hold it then.
        start_flag: of the training command, by which another run begins with such weights alone; None where there is none.
    """

    prefix = "diffusion"
    suffix = ""
    rounds = False
    start_flag: str | None = None

    def __init__(self, config: DictConfig, base_hash: str | None = None):
        self.config: dict[str, Any] = OmegaConf.to_container(config)
        self.base_hash = base_hash

    @abstractmethod
    def save(self, model: nn.Module, path: Path, step: int, writes: bool) -> Callable[[], None]:
        """Copy now what changes with the next step; returns what writes it, for a thread.

        Every process calls it, since sharded weights are gathered from all; the one that `writes` alone writes.
        """

    @abstractmethod
    def read(self, path: Path) -> Mapping[str, Tensor]:
        """The averages by the name of the trained weight.

        Raises:
            CheckpointError: if the file is missing or damaged, or belongs to other weights.
        """


def check_folder(folder: Path, files: type[WeightsFiles]) -> None:
    """See that a folder holds no other kind of run, whose metrics.jsonl and run.json a run with these files would replace.

    Raises:
        CheckpointError: if it does.
    """
    for state in sorted(folder.glob("*.state.pt")):
        kind = re.fullmatch(r"([a-z]+)-[0-9]+(|-[a-z]+)\.state\.pt", state.name)
        if kind and kind.groups() != (files.prefix, files.suffix):
            raise CheckpointError(
                f"{folder} holds a run of another kind ({state.name}), whose metrics.jsonl and run.json this one would "
                "replace; give this one a folder of its own, with --output_path"
            )


class ModelWeights(WeightsFiles):
    """A whole diffusion model: diffusion-N.safetensors."""

    start_flag = "--load_model_weights_from_checkpoint"

    def save(self, model: DiffusionModel, path: Path, step: int, writes: bool) -> Callable[[], None]:
        tensors = host_copy(model.state_dict(), writes)
        return partial(save_model, path, tensors, config=self.config, image_shape=model.image_shape, step=step)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        return load_model_file(path).tensors


class AdapterWeights(WeightsFiles):
    """A LoRA, with the learned words beside it, if any: diffusion-N-lora.safetensors.

    Of a latent diffusion model it is also written in the forms that other tools read.
    """

    suffix = "-lora"

    def __init__(self, config: DictConfig, base_hash: str | None = None):
        super().__init__(config, base_hash)
        self.rounds = config.checkpoints.lora_dtype != "float32"
        self.dtype = getattr(torch, config.checkpoints.lora_dtype) if self.rounds else None  # None: as they are trained

    def save(self, model: DiffusionModel, path: Path, step: int, writes: bool) -> Callable[[], None]:
        if not writes:
            return lambda: None
        said = {"base_hash": self.base_hash, "config": self.config, "step": step}
        lora = lora_file_of(model, tokens=model.text_encoder.learned_tokens(), **said)
        modules = {name: replace(factors, **host_copy(vars(factors))) for name, factors in lora.modules.items()}
        return partial(self._write, replace(lora, modules=modules), path)

    def _write(self, lora: LoRAFile, path: Path) -> None:
        try:
            write_lora(lora, path, "native", dtype=self.dtype)
        except RoundingError as error:
            print(f"{path.name} is written in float32: {error}", file=sys.stderr)
            write_lora(lora, path, "native")
        if self.config["model"]["autoencoder"]["kind"] == "kl":
            export_lora(path)

    def read(self, path: Path) -> Mapping[str, Tensor]:
        lora = read_lora(path)
        if lora.base_hash != self.base_hash:
            raise CheckpointError(f"{path} is of another base: {lora.base_hash}, this run's is {self.base_hash}")
        return _learned_embedding(lora.tokens) | {
            f"{name}.{part}": tensor
            for name, f in lora.modules.items()
            for part, tensor in (("lora_A", f.lora_A), ("lora_B", f.lora_B), ("lora_magnitude", f.magnitude))
        }


class TokenWeights(WeightsFiles):
    """Learned words alone, in the form of diffusers' learned_embeds: diffusion-N-tokens.safetensors."""

    suffix = "-tokens"

    def save(self, model: DiffusionModel, path: Path, step: int, writes: bool) -> Callable[[], None]:
        return partial(save_learned_tokens, path, model.text_encoder.learned_tokens()) if writes else lambda: None

    def read(self, path: Path) -> Mapping[str, Tensor]:
        return _learned_embedding(read_learned_tokens(path))


class ClipWeights(WeightsFiles):
    """Both towers of the tiny CLIP: clip-N.safetensors."""

    prefix = "clip"

    def save(self, model: nn.Module, path: Path, step: int, writes: bool) -> Callable[[], None]:
        tensors = host_copy(model.state_dict(), writes)
        return partial(save_safetensors, path, tensors, header(CLIP_FORMAT, self.config, step))

    def read(self, path: Path) -> Mapping[str, Tensor]:
        return load_safetensors(path)[0]


def _learned_embedding(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Learned words as the parameter that holds them."""
    return {"text_encoder.learned_embedding": torch.cat(list(tokens.values()))} if tokens else {}
