"""Shapes in annotations are checked while the tests run: the hook wraps the package's functions as they are imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook(
    [
        f"xdiffusion.{part}"
        for part in (
            "autoencoders", "data", "diffusion", "evaluation", "layers", "lora", "networks", "samplers", "text_encoders",
        )
    ],
    "typechecking.check",
)  # fmt: skip

import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def mnist8k() -> Path:
    folder = SHARED / "mnist8k"
    if not folder.is_dir():
        pytest.skip("needs the digits of ../shared/data/mnist8k, which are not here")
    return folder
