"""What a PNG says of how it was drawn: what changed since is told, what is given beside it counts, nothing is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import SAMPLE, files_in, run_script
from omegaconf import OmegaConf
from txt2img_cases import ATTENTION, factors, pixels, save_picture

from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.pictures import read_metadata


def test_other_content_under_the_name_of_a_file_is_warned_about(sample, work_folder, generator, capsys):
    path, again = Path("a.safetensors"), ("--from_png", "a/image-0.png", "--output_path", "b")
    write_lora(LoRAFile({ATTENTION: factors(generator)}), path, "native")
    assert sample("a", "--prompt", "a fox", "--lora_path", path) == 0
    assert run_script(SAMPLE, *again) == 0
    assert capsys.readouterr().err == ""
    write_lora(LoRAFile({ATTENTION: factors(generator)}), path, "native")
    assert run_script(SAMPLE, *again) == 0
    assert capsys.readouterr().err == "warning: --lora_path: other content than what drew the picture, so this is another one\n"
    assert files_in(work_folder / "b") == {"samples.png", "image-0.png", "image-0-2.png"}  # by the same command


def test_another_checkpoint_under_the_same_name_is_warned_about(sample, tiny_txt2img, work_folder, capsys):
    file, again = load_model_file(tiny_txt2img), ("--from_png", "a/image-0.png", "--output_path", "b")
    weights = {name: tensor.clone() for name, tensor in file.tensors.items()}
    about = {"config": file.config, "image_shape": file.image_shape, "step": 0}
    save_model(Path("base.safetensors"), weights, **about)
    assert sample("a", "--prompt", "a fox", "--checkpoint", "base.safetensors") == 0
    assert run_script(SAMPLE, *again, "--mixed_precision", "bf16") == 0
    assert capsys.readouterr().err == ""
    weights["network.conv_out.weight"] *= 1.01
    save_model(Path("base.safetensors"), weights, **about)
    assert run_script(SAMPLE, *again) == 0
    assert capsys.readouterr().err.startswith("warning: --checkpoint: other content than what drew the picture")


def test_another_config_under_the_same_name_is_warned_about(sample, tiny_txt2img, work_folder, capsys):
    config = OmegaConf.create(load_model_file(tiny_txt2img).config)
    Path("base.yaml").write_text(OmegaConf.to_yaml(config))
    Path("mine.yaml").write_text("base: base.yaml")
    assert sample("a", "--prompt", "a fox", "--config_path", "mine.yaml") == 0
    Path("mine.yaml").write_text("# one more\nbase: base.yaml\n")
    assert run_script(SAMPLE, "--from_png", "a/image-0.png", "--output_path", "b") == 0
    assert capsys.readouterr().err == ""
    config.sampling.cfg_scale += 1
    Path("base.yaml").write_text(OmegaConf.to_yaml(config))
    assert run_script(SAMPLE, "--from_png", "a/image-0.png", "--output_path", "b") == 0
    assert "warning: --config_path: other content than what drew the picture" in capsys.readouterr().err


def test_another_sampler_leaves_the_settings_of_the_first_behind(sample, work_folder):
    words = ["--prompt", "a fox", "--sampler", "ddim", "--set", "sampling.sampler.eta=0.5", "--set", "sampling.steps=3"]
    assert sample("a", *words) == 0
    assert run_script(SAMPLE, "--from_png", "a/image-0.png", "--output_path", "b", "--sampler", "euler") == 0
    assert sample("c", "--prompt", "a fox", "--sampler", "euler", "--sampling_steps", 3) == 0
    assert np.array_equal(pixels("b/image-0.png"), pixels("c/image-0.png"))


def test_a_picture_that_another_command_drew_stays(sample, work_folder):
    assert sample("a", "--prompt", "a fox") == 0
    fox = Path("a/image-0.png").read_bytes()
    assert sample("a", "--prompt", "a fox") == 0  # the same again
    assert files_in(work_folder / "a") == {"samples.png", "image-0.png"}
    save_picture("a/image-0-2.png")
    assert sample("a", "--prompt", "a dog") == 0
    assert files_in(work_folder / "a") == {"samples.png", "image-0.png", "image-0-2.png", "image-0-3.png"}
    assert Path("a/image-0.png").read_bytes() == fox


def test_a_picture_that_is_started_from_is_not_overwritten(sample, work_folder, capsys):
    Path("a").mkdir()
    save_picture("a/samples.png")
    before = Path("a/samples.png").read_bytes()
    assert sample("a", "--prompt", "a fox", "--init_image", "a/samples.png") == 2
    assert "a/samples.png would be overwritten" in capsys.readouterr().err
    assert Path("a/samples.png").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "bad \udcff byte"], r"--prompt 'bad \udcff byte' is no Unicode text"),
        (["--prompt", "x", "--seed", 2**63 - 1, "--num_samples", 2], "of 2 images the last would have a seed above"),
    ],
)
def test_what_could_not_be_drawn_again_is_not_drawn(words, message, sample, work_folder, capsys):
    assert sample("a", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(work_folder.rglob("*.png"))


def test_any_letter_may_stand_in_a_negative_prompt(sample, work_folder):
    negative = 'ünï "\U0001f98a" \x7f: #'
    assert sample("a", "--prompt", "a \U0001f98a", "--negative_prompt", negative) == 0
    assert json.loads(read_metadata(Path("a/image-0.png"))["sampling"])["negative_prompt"] == negative
    assert run_script(SAMPLE, "--from_png", "a/image-0.png", "--output_path", "b") == 0
    assert np.array_equal(pixels("a/image-0.png"), pixels("b/image-0.png"))
