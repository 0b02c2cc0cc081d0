"""A tiny Stable Diffusion for the sampling command, and what tests look at of its pictures."""

from pathlib import Path

import numpy as np
import torch
from commands import ROOT
from omegaconf import OmegaConf
from PIL import Image

from xdiffusion.build import build_model, load_config
from xdiffusion.checkpoints.lora_file import LoRAFactors
from xdiffusion.checkpoints.native import save_model

SIZE = 16
ATTENTION = "network.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def write_txt2img(path: Path) -> Path:
    """Stable Diffusion's parts in small, with random weights."""
    config = load_config(
        ROOT / "configs/image/sd/sd15_tiny.yaml",
        [f"data.image_size={SIZE}", "model.network.channels=[8,8]", "model.network.transformer_depth=[1,0]",
         "model.network.num_res_blocks=1", "model.text_encoder.width=8", "model.text_encoder.layers=2",
         "model.autoencoder.widths=[4,4]", "sampling.steps=2", "sampling.prompt_syntax=weighted"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = OmegaConf.to_container(config)
    save_model(path, model.state_dict(), config=plain, image_shape=model.image_shape, step=0)
    return path


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def save_picture(path: str, size=(SIZE, SIZE), seed=0) -> str:
    levels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def factors(generator):
    return LoRAFactors(torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), 2.0)
