"""Checkpoints of a run: the averaged weights for users, and beside them the state that resumes training exactly.

`diffusion-N.safetensors` (a LoRA run: `diffusion-N-lora.safetensors`) holds what is sampled; `....state.pt` holds the
trained weights without averaging, the optimizer and the gradient scaler. All draws follow from the seed and the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from xdiffusion.checkpoints.files import CheckpointError, existing_weights, load_pickled, write_atomically
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.lora.weights import save_lora_weights
from xdiffusion.training.loop import Trainer


class RunCheckpoints:
    """Writes and reads the checkpoints of one run.

    Args:
        folder: of the run (a LoRA run: its `lora` folder).
        config: resolved; saved in every file.
        base_hash: of the frozen base in a LoRA run; None in a base run.
    """

    def __init__(self, folder: Path, config: DictConfig, base_hash: str | None = None):
        self.folder = folder
        self.config: dict[str, Any] = OmegaConf.to_container(config)
        self.base_hash = base_hash

    def path(self, step: int) -> Path:
        """The weights file of a step."""
        return self.folder / f"diffusion-{step}{'-lora' if self.base_hash else ''}.safetensors"

    def save(self, trainer: Trainer, step: int) -> Path:
        """Write weights (the moving average must be in place) and state of a step; returns the weights' path."""
        path = self.path(step)
        if self.base_hash:
            save_lora_weights(trainer.model, path, base_hash=self.base_hash, config=self.config, step=step)
        else:
            save_model(
                path,
                trainer.model.state_dict(),
                config=self.config,
                image_shape=trainer.model.image_shape,
                step=step,
            )
        write_atomically(state_path(path), lambda temporary: torch.save(self._state(trainer, step), temporary))
        return path

    def resume(self, trainer: Trainer, resume_from: str) -> int:
        """Put a saved run back into the trainer; returns its step.

        Args:
            trainer: fresh, of the same config.
            resume_from: a weights file, or "auto" for the newest of this folder (step 0 where there is none).

        Raises:
            CheckpointError: if either file is missing or damaged, or belongs to other weights.
        """
        if resume_from == "auto" and self.newest() is None:
            return 0
        path = self.newest() if resume_from == "auto" else existing_weights(Path(resume_from))[0]
        averaged = self._averaged(path)
        state = load_pickled(state_path(path))
        try:
            average = {name: _trained_part(averaged[_file_name(name)], p) for name, p in trainer.trainable.items()}
            _copy_into(dict(zip(trainer.trainable, trainer.ema.average)), average)
            _copy_into(trainer.trainable, state["trained"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            if trainer.accelerator.scaler is not None and state["scaler"]:
                trainer.accelerator.scaler.load_state_dict(state["scaler"])
            return int(state["step"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not belong to this run: {error}") from error

    def _averaged(self, path: Path) -> dict[str, torch.Tensor]:
        if not self.base_hash:
            return load_model_file(path).tensors
        lora = read_lora(path)
        if lora.base_hash != self.base_hash:
            raise CheckpointError(f"{path} is of another base: {lora.base_hash}, this run's is {self.base_hash}")
        return {
            f"{name}.{part}": tensor
            for name, f in lora.modules.items()
            for part, tensor in (("lora_A", f.lora_A), ("lora_B", f.lora_B), ("lora_magnitude", f.magnitude))
        }

    def newest(self) -> Path | None:
        """The weights file of the highest step that has its state beside it."""
        steps = {}
        for state in self.folder.glob("diffusion-*.state.pt"):
            step = state.name.split("-")[1].split(".")[0]
            if step.isdigit() and self.path(int(step)).is_file():
                steps[int(step)] = self.path(int(step))
        return steps[max(steps)] if steps else None

    def _state(self, trainer: Trainer, step: int) -> dict[str, Any]:
        scaler = trainer.accelerator.scaler
        return {
            "step": step,
            "trained": dict(zip(trainer.trainable, trainer.ema.trained())),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }


def state_path(weights: Path) -> Path:
    """diffusion-N.safetensors -> diffusion-N.state.pt."""
    return weights.with_suffix(".state.pt")


def _file_name(parameter: str) -> str:
    """network.x.lora_A.default -> network.x.lora_A, as LoRA files name factors; other names stay."""
    module, _, _ = parameter.rpartition(".")
    return module if module.endswith((".lora_A", ".lora_B", ".lora_magnitude")) else parameter


def _trained_part(stored: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """All of it, but for PiSSA, in whose file the frozen first factors follow the trained ones."""
    return stored[tuple(map(slice, parameter.shape))]


@torch.no_grad()
def _copy_into(target: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{name} has shape {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data.copy_(source[name])
