"""Stable Diffusion in small, with random weights, as a model and as a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from xdiffusion.build import build_model, image_shape, load_config
from xdiffusion.checkpoints.native import save_model
from xdiffusion.loading import STABLE_DIFFUSION
from xdiffusion.model import DiffusionModel

TINY_SD = ("sd15_tiny", "sd21_base_tiny", "sd21_v_tiny")
FULL_SD = ("sd15", "sd21_base", "sd21_v")

EXTRA = {  # what original files hold beside the model
    "betas": torch.zeros(3),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "first_stage_model.model_ema.decay": torch.zeros(()),
    "first_stage_model.model_ema.num_updates": torch.zeros(()),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.zeros(()),
}


def sd_config(name: str) -> DictConfig:
    """A built-in config by name."""
    return load_config(STABLE_DIFFUSION / f"{name}.yaml")


@cache
def _tensors(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_model(sd_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.text_encoder.text_projection.weight.copy_(torch.eye(model.text_encoder.width))
    return model.state_dict()


def random_sd(name: str) -> DiffusionModel:
    """The same weights on every call, none of them the zeros that a fresh network starts from; no text projection."""
    model = build_model(sd_config(name))
    model.load_state_dict(_tensors(name))
    return model.eval().requires_grad_(False)


def text_names(name: str) -> str:
    """How the text encoder is named in an original file of this model."""
    return "transformers" if name.startswith("sd15") else "open_clip"


def names_of_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors as the installed transformers names them: version 5 has come to drop `text_model.`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)).state_dict()
    if any(name.startswith("text_model.") for name in theirs):
        return tensors
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def write_native(name: str, path: Path, config: DictConfig | None = None) -> Path:
    """The model of `random_sd` as a file of this project, which may say another config of its shapes."""
    config = config or sd_config(name)
    plain = OmegaConf.to_container(config)
    save_model(path, _tensors(name), config=plain, image_shape=image_shape(config), step=0)
    return path


class OfAMac:
    """A tensor as torch 1.13 pickled those of a Mac's GPU."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce_ex__(self, protocol):
        return torch._utils._rebuild_device_tensor_from_numpy, (self.tensor.numpy(), self.tensor.dtype, "mps:0", True)
