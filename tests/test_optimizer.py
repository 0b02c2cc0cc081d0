"""Which optimizer a config names."""

import sys
from types import ModuleType

import pytest
import torch
from tiny import tiny_config, tiny_trainer
from torch import nn

from xdiffusion.training.optimizer import build_optimizer
from xdiffusion.training.settings import OptimizerSettings

SETTINGS = {"learning_rate": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.25}


def groups():
    return [[nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))]]


def test_adamw_is_torchs_with_the_settings():
    optimizer = build_optimizer(groups(), OptimizerSettings(**SETTINGS))
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.25)


@pytest.fixture
def bitsandbytes(monkeypatch):
    library = ModuleType("bitsandbytes.optim")
    library.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    return library


def test_adamw8bit_is_bitsandbytes_with_the_settings(bitsandbytes):
    optimizer = build_optimizer(groups(), OptimizerSettings(kind="adamw8bit", **SETTINGS))
    assert type(optimizer) is bitsandbytes.AdamW8bit and optimizer.param_groups[1]["weight_decay"] == 0.25


def test_adamw8bit_updates_each_weight_on_its_own(bitsandbytes):
    """It has one scale for 256 values in a row, which would be of several weights side by side in a buffer."""
    trainer = tiny_trainer(tiny_config("optimizer.kind=adamw8bit"))
    updated = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in updated} == {id(p) for p in trainer.trainable.values()}


def test_without_bitsandbytes_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="needs the library bitsandbytes: pip install bitsandbytes"):
        build_optimizer(groups(), OptimizerSettings(kind="adamw8bit"))
