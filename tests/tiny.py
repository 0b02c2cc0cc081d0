"""A config, a data set and a trainer that are small enough for a test to train."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState
from omegaconf import DictConfig

from xdiffusion.build import build_model, override
from xdiffusion.data.captions import PROMPT_TABLES, PromptTable
from xdiffusion.data.image_set import ImageSet, Split
from xdiffusion.model import DiffusionModel
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.trainable import make_trainable

SMALLEST = "data: {kind: image/digits, image_size: 16}\ndiffusion: {prediction: v}\n"  # a YAML with what no config can lack
SIZE = 12
SETTINGS = {
    "data": {"kind": "image/digits", "image_size": SIZE},
    "model": {
        "network": {"channels": [16, 16], "num_res_blocks": 1, "transformer_depth": [0, 1], "head_dim": 8,
                    "ff_mult": 2, "norm_groups": 4},
        "text_encoder": {"width": 8, "layers": 1, "heads": 2, "context_length": 8, "pretrained": None},
    },
    "diffusion": {"prediction": "v"},
    "training": {"num_training_steps": 4, "batch_size": 8, "save_and_sample_every_n": 2, "ema_decay": 0.5},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
    "sampling": {"steps": 2},
    "lora": {"rank": 2, "alpha": 4},
}  # fmt: skip


def tiny_config(*overrides: str) -> DictConfig:
    """The settings above with `KEY=VALUE` overrides, checked as a YAML's are."""
    return override(SETTINGS, overrides, "tests/tiny.py")


def tiny_images(train: int = 60, test: int = 20, seed: int = 0) -> ImageSet:
    """Ten classes, each a random bright pattern of its own inside a dark margin, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.zeros(10, 1, SIZE, SIZE)
    patterns[:, :, 3:-3, 3:-3] = 200 * torch.randint(2, (10, 1, SIZE - 6, SIZE - 6), generator=generator)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 10
        noise = torch.randint(50, (count, 1, SIZE, SIZE), generator=generator)
        return Split((patterns[labels] + noise).to(torch.uint8), labels)

    return ImageSet("image/digits", split(train), split(test), PROMPT_TABLES["image/digits"])


class PlainNetwork(torch.nn.Module):
    """A network with nothing but the contract's call."""

    def __init__(self, in_channels: int, context_dim: int, width: int = 4):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(in_channels, width, 3, padding=1)
        self.to_context = torch.nn.Linear(context_dim, width)
        self.conv_out = torch.nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, xt, time, context):
        return self.conv_out((self.conv_in(xt) + self.to_context(context.mean(1))[:, :, None, None]).relu())


def tiny_model(config: DictConfig) -> DiffusionModel:
    """The same weights on every call, none of them the zeros that a fresh network starts from."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def tiny_trainer(config: DictConfig, data: ImageSet | None = None, *, lora: bool = False) -> Trainer:
    """A fresh trainer on the CPU; equal arguments give equal weights."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the trainer before
    model = tiny_model(config).eval()  # as after drawing with it; the trainer puts it into training mode
    make_trainable(model, config, lora=lora)
    return Trainer(DiffusionTask(model, data or tiny_images(), config), force_cpu=True)


def label_of(table: PromptTable, prompt: str) -> int:
    """The class that a caption names."""
    (label,) = (label for label, captions in enumerate(table.captions) if prompt in captions)
    return label


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values now, whatever happens to the tensors later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
