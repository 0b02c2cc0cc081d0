"""Stable Diffusion's files and a LoRA of another tool, from the sampling command's words to pictures that repeat."""

import json

import numpy as np
import pytest
from commands import ROOT, SAMPLE, files_in, run_script
from lora_cases import factors
from PIL import Image
from sd_files import random_sd, write_native

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora
from xdiffusion.commands import sd

FEW = ["--prompt", "a (red:1.2) fox", "--sampling_steps", 2, "--num_samples", 2, "--seed", 5, "--force_cpu"]
STYLE = ["--lora_path", "style.safetensors:0.8"]
IMAGES = ("image-5.png", "image-6.png")


@pytest.fixture
def files(work_folder):
    """In the current folder: the tiny model as an original file and as a folder of diffusers, and a LoRA in kohya's form."""
    write_native("sd15_tiny", work_folder / "native.safetensors")
    sd.main(["convert", "native.safetensors", "v1-5-pruned-emaonly.safetensors", "--to", "original"])
    sd.main(["convert", "v1-5-pruned-emaonly.safetensors", "pipeline", "--to", "diffusers"])
    (work_folder / "native.safetensors").unlink()
    weights = random_sd("sd15_tiny").state_dict()
    chosen = [n for n in weights if n.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "layers.1.attn.to_v.weight"))]
    names = [n.removesuffix(".weight") for n in chosen if not n.startswith("autoencoder.")]
    modules = {exchange_name(n): factors(tuple(weights[f"{n}.weight"].shape), seed=i) for i, n in enumerate(names)}
    assert {name.partition(".")[0] for name in modules} == {"unet", "text_encoder"}
    write_lora(LoRAFile(modules), work_folder / "style.safetensors", "kohya")
    return modules


def pixels(folder: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f"{folder}/{name}")).astype(int) for name in IMAGES])


def test_original_file_folder_and_kohya_lora_draw_pictures_that_repeat(files, work_folder, capsys):
    original = ["--checkpoint", "v1-5-pruned-emaonly.safetensors", *FEW]
    assert run_script(SAMPLE, *original, "--output_path", "base") == 0
    assert run_script(SAMPLE, *original, *STYLE, "--output_path", "styled") == 0
    assert f"{len(files)} modules matched, none missing, none unexpected" in capsys.readouterr().out
    assert files_in(work_folder / "styled") == {"samples.png", *IMAGES}
    assert pixels("base").shape == (2, 64, 64, 3)
    assert np.abs(pixels("styled") - pixels("base")).max() > 0

    assert run_script(SAMPLE, "--checkpoint", "pipeline", *FEW, *STYLE, "--output_path", "of_folder") == 0
    assert np.abs(pixels("of_folder") - pixels("styled")).max() <= 1

    with Image.open("styled/image-6.png") as picture:
        assert json.loads(picture.text["loras"]) == ["style.safetensors:0.8"]
        assert picture.text["checkpoint"] == "v1-5-pruned-emaonly.safetensors"
    assert run_script(SAMPLE, "--from_png", "styled/samples.png", "--output_path", "again") == 0
    assert np.array_equal(pixels("again"), pixels("styled"))
    assert run_script(SAMPLE, "--from_png", "styled/samples.png", "--lora_merge", "--output_path", "merged") == 0
    assert np.abs(pixels("merged") - pixels("styled")).max() <= 1


def test_each_checkpoint_of_a_folder_has_an_output_folder_of_its_own(files, work_folder):
    """Named by the file, also where a config is named beside it; of ours, which lie in a run's folder, by that."""
    (work_folder / "v1.5-other").symlink_to(work_folder / "pipeline")
    sd.main(["convert", "pipeline", "run/diffusion-0.safetensors", "--to", "native"])
    config = ["--config_path", ROOT / "configs/image/sd/sd15_tiny.yaml"]
    drawn = {
        ("v1-5-pruned-emaonly.safetensors",): "v1-5-pruned-emaonly",
        ("pipeline", *config): "pipeline",
        ("v1.5-other",): "v1.5-other",
        ("run/diffusion-0.safetensors",): "run",
        ("./run/../run/diffusion-0.safetensors", *config): "sd15_tiny",
    }
    for checkpoint, _ in drawn.items():
        assert run_script(SAMPLE, "--checkpoint", *checkpoint, *FEW, "--sampling_steps", 1) == 0
    folders = {path.parent.name for path in (work_folder / "output").rglob("image-5.png")}
    assert folders == set(drawn.values())
