"""Shapes in annotations are checked while the tests run: the hook wraps the package's functions as they are imported."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait must not keep a core from other tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# while a hooked module is imported, bytecode has other names: what these import would be compiled again, for four seconds
import accelerate  # noqa: F401
import torch._dynamo
import typechecking  # noqa: F401

install_import_hook(
    [
        f"xdiffusion.{part}"
        for part in (
            "autoencoders", "data", "diffusion", "evaluation", "layers", "lora", "networks", "samplers", "text_encoders",
        )
    ],
    "typechecking.check",
)  # fmt: skip

# the same examples in every run; --hypothesis-profile=fresh has others each time, which --hypothesis-seed repeats
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("fresh", derandomize=False, database=None, print_blob=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_hang() -> Iterator[None]:
    """What attacks a reader takes it a second of a quiet processor at most. A busy one has some more; a hang takes minutes."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 6


@pytest.fixture
def write_yaml(tmp_path):
    """Writes files by name into a folder and returns the path of the last."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def mnist8k() -> Path:
    folder = SHARED / "mnist8k"
    if not folder.is_dir():
        pytest.skip("needs the digits of ../shared/data/mnist8k, which are not here")
    return folder


@pytest.fixture(scope="session")
def fake_mnist(tmp_path_factory) -> Path:
    """A folder for --data_dir with a few random pictures in MNIST's layout."""
    from fake_sets import write_mnist

    return write_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="session")
def fake_cifar10(tmp_path_factory) -> Path:
    """A folder for --data_dir with a few random pictures in CIFAR-10's layout."""
    from fake_sets import write_cifar10

    return write_cifar10(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> SimpleNamespace:
    """A tiny base model and a LoRA on it, trained for two steps by the training command into its default folders.

    config_path and overrides (KEY=VALUE) are what it was called with; checkpoint and lora are the files it wrote.
    """
    from commands import TRAIN, run_script, set_words

    config_path = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
    overrides = [
        "data.image_size=12", "model.network.channels=[16,16]", "model.network.head_dim=8",
        "model.network.norm_groups=4", "model.network.patch_size=1", "model.text_encoder.width=8",
        "model.text_encoder.layers=1", "model.text_encoder.pretrained=null", "training.num_training_steps=2",
        "training.save_and_sample_every_n=2", "training.batch_size=4", "optimizer.warmup_steps=0", "sampling.steps=2",
        "lora.target_modules=attention",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_run")
    output = folder / "output/image"
    checkpoint = output / "digits" / config_path.stem / "diffusion-2.safetensors"
    lora = output / "digits_inverted" / config_path.stem / "lora/diffusion-2-lora.safetensors"
    common = ["--config_path", config_path, *set_words(overrides)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_script(TRAIN, *common) == 0
        adapt = ["--dataset_name", "image/digits_inverted", "--use_lora_training"]
        assert run_script(TRAIN, *common, *adapt, "--load_model_weights_from_checkpoint", checkpoint) == 0
    return SimpleNamespace(config_path=config_path, overrides=overrides, checkpoint=checkpoint, lora=lora)


@pytest.fixture
def work_folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder, so that default output paths do not leave the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_txt2img(tmp_path_factory) -> Path:
    from txt2img_cases import write_txt2img

    return write_txt2img(tmp_path_factory.mktemp("tiny_txt2img") / "diffusion-0.safetensors")


@pytest.fixture
def sample(tiny_txt2img, work_folder):
    """sample(folder, *words): the exit status; the images are in `folder` of the current one."""
    from commands import SAMPLE, run_script

    return lambda folder, *words: run_script(SAMPLE, "--checkpoint", tiny_txt2img, "--output_path", folder, *words)


@pytest.fixture
def evidence(monkeypatch):
    """The function of bench/kill_runs.py: what two runs must have in common."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import kill_runs

    return kill_runs.evidence


@pytest.fixture
def signals(monkeypatch):
    """A mapping of steps to the signal that this process sends itself within them."""
    sent = {}
    from xdiffusion.training.records import Records

    record = Records.step

    def step(self, metrics):
        record(self, metrics)
        if metrics.step in sent:
            os.kill(os.getpid(), sent.pop(metrics.step))

    monkeypatch.setattr(Records, "step", step)
    return sent
