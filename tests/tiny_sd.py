"""Stable Diffusion small enough for a test to train: a config, a model, pictures, and a trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from omegaconf import DictConfig

from xdiffusion.build import build_data, build_model, load_config
from xdiffusion.model import DiffusionModel
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.trainable import make_trainable

CONFIGS = Path(__file__).resolve().parents[1] / "configs/image/sd"
SMALLER = [
    "data.image_size=16", "data.bucket_multiple=4", "model.network.channels=[8,8]", "model.network.norm_groups=4",
    "model.network.transformer_depth=[1,0]", "model.network.num_res_blocks=1", "model.text_encoder.width=8",
    "model.text_encoder.heads=2",
    "model.text_encoder.context_length=8", "model.text_encoder.layers=1", "model.autoencoder.widths=[4,4]",
    "model.autoencoder.norm_groups=2", "model.autoencoder.num_res_blocks=1", "sampling.steps=1",
    "training.num_training_steps=4", "training.save_and_sample_every_n=2", "training.batch_size=4",
    "training.gradient_checkpointing=false", "training.ema_decay=0.5", "optimizer.warmup_steps=0",
    "training.gradient_accumulation_steps=1",
]  # fmt: skip


def tiny_sd_config(folder: Path, *overrides: str, name: str = "sd15_lora_tiny", lora: bool = True) -> DictConfig:
    """A shipped config, smaller still; pictures are read from folder/set and caches written to folder/cache."""
    paths = [f"data.data_dir={folder / 'set'}", f"cache.folder={folder / 'cache'}"]
    return load_config(CONFIGS / f"{name}.yaml", [*SMALLER, *paths, *overrides], lora)


def tiny_sd_model(config: DictConfig, spread: float = 0.1) -> DiffusionModel:
    """The same weights on every call, none of them the zeros that a fresh network starts from, but `spread` apart."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tiny_sd_trainer(config: DictConfig, *, lora: bool = True, **arguments) -> Trainer:
    """A fresh trainer on the CPU; equal arguments give equal weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = tiny_sd_model(config)
    make_trainable(model, config, lora=lora)
    return Trainer(DiffusionTask(model, build_data(config), config, **arguments), force_cpu=True)
