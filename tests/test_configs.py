"""Every shipped config resolves, trains, adapts and samples; each is short."""

import runpy
from pathlib import Path

import pytest

from xdiffusion.build import load_config
from xdiffusion.cli import run

ROOT = Path(__file__).resolve().parents[1]
ALL_CONFIGS = sorted((ROOT / "configs/image").rglob("*.yaml"))
CONFIGS = [path for path in ALL_CONFIGS if path.parent.name != "sd"]
SD_CONFIGS = [path for path in ALL_CONFIGS if path.parent.name == "sd"]
FAST = ["--set", "model.text_encoder.pretrained=null", "--num_training_steps", "2", "--batch_size", "2", "--force_cpu"]
FAST += ["--set", "sampling.steps=1", "--set", "sampling.cfg_scale=1"]


def main_of(script: str):
    return runpy.run_path(str(ROOT / script))["main"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config_is_short_and_its_name_tells_its_size_prediction_and_schedule(path):
    assert len(path.read_text().splitlines()) < 45
    config = load_config(path)
    assert config.data.kind == f"image/{path.parent.name}"
    kinds = {"cosine": "continuous", "betas": "discrete"}
    prediction = {"v": "v", "eps": "epsilon"}[config.diffusion.prediction]
    size = config.data.image_size
    assert path.stem == f"ddpm_{size}x{size}_{prediction}_{kinds[config.diffusion.schedule.kind]}_clip"


@pytest.mark.parametrize("path", SD_CONFIGS, ids=lambda p: p.stem)
def test_sd_config_is_short_and_its_name_tells_the_model(path):
    assert len(path.read_text().splitlines()) < 45
    config = load_config(path)
    assert config.data.kind == "image/folder"
    words = path.stem.split("_")
    tiny = "tiny" in words
    assert config.diffusion.prediction == ("v" if "v" in words else "eps")
    assert config.data.image_size == (64 if tiny else 768 if "v" in words else 512)
    widths = {"sd15": 768, "sd21": 1024, "sd15 tiny": 16, "sd21 tiny": 24}
    assert config.model.text_encoder.width == widths[words[0] + " tiny" * tiny]
    assert config.diffusion.schedule.spacing == "scaled_linear"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config_trains_a_base_and_a_lora_and_samples(path, tmp_path, monkeypatch, request):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    name = path.parent.name
    data = [] if name == "digits" else ["--data_dir", str(request.getfixturevalue(f"fake_{name}"))]
    train = main_of("training/image/train.py")
    assert run(train, ["--config_path", str(path), "--output_path", "base", *FAST, *data]) == 0
    base = "base/diffusion-2.safetensors"
    adapt = ["--dataset_name", f"image/{name}_inverted", "--use_lora_training", "--output_path", "lora"]
    adapt += ["--load_model_weights_from_checkpoint", base]
    assert run(train, ["--config_path", str(path), *adapt, *FAST, *data]) == 0
    sample = ["--checkpoint", base, "--lora_path", "lora/diffusion-2-lora.safetensors", "--output_path", "samples"]
    few = ["--num_samples", "2", "--sampling_steps", "2", "--force_cpu"]
    assert run(main_of("sampling/image/sample.py"), [*sample, *few]) == 0
    assert {p.name for p in Path("samples").iterdir()} == {"base.png", "lora.png", "paired.png"}
