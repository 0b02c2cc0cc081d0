"""Runs of Stable Diffusion, stopped and resumed: every file is, bit for bit, that of the run which nobody stopped."""

import signal

import pytest
from commands import TRAIN, run_script, set_words
from picture_folders import write_pictures
from test_sd_training import CONFIGS, SMALLER
from tiny_sd import tiny_sd_model

from xdiffusion.build import load_config
from xdiffusion.checkpoints.native import save_model

CAPTION = ["data.captions=[a photo of <cat>]"]
VARIANTS = {  # config, whether it is a LoRA's, more
    "lora, text encoder's too, accumulated, bf16": (
        "sd15_lora_textencoder_tiny",
        True,
        ["training.gradient_accumulation_steps=2", "training.mixed_precision=bf16", "lora.dropout=0.1"],
    ),
    "pivotal, cached latents, flipped, offset noise": (
        "sd15_textual_inversion_tiny",
        True,
        [*CAPTION, "cache.latents=true", "data.flip=true", "diffusion.offset_noise=0.1"],
    ),
    "dreambooth": ("sd15_dreambooth_lora_tiny", True, ["prior.num_images=2", "training.batch_size=2"]),
    "a word": ("sd15_textual_inversion_tiny", False, CAPTION),
    "all weights, accumulated": ("sd21_v_tiny", False, ["training.batch_size=2", "training.gradient_accumulation_steps=2"]),
}


@pytest.mark.parametrize(("name", "lora", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name, lora, more, work_folder, evidence, signals):
    overrides = [*SMALLER, *more, "training.num_training_steps=4", "training.save_and_sample_every_n=2"]
    model = tiny_sd_model(load_config(CONFIGS / f"{name}.yaml", overrides, lora))
    save_model(work_folder / "base.safetensors", model.state_dict(), config={}, image_shape=model.image_shape, step=0)
    write_pictures(work_folder / "set", [(32, 32), (32, 24), (24, 32), (32, 32)], ["a", "b", "c", "d"])
    words = ["--config_path", CONFIGS / f"{name}.yaml", "--data_dir", "set", "--force_cpu", *set_words(overrides)]
    words += ["--load_model_weights_from_checkpoint", "base.safetensors", *["--use_lora_training"] * lora, "--output_path"]
    assert run_script(TRAIN, *words, "whole") == 0
    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *words, "cut", "--resume_from", "auto") == 130
    assert run_script(TRAIN, *words, "cut", "--resume_from", "auto") == 0
    expected, found = evidence(work_folder / "whole"), evidence(work_folder / "cut")
    assert {name.split(".")[0].split("-")[1] for name in found.keys() - expected.keys()} == {"3"}
    assert {name: found[name] for name in expected} == expected and len(expected["metrics"]) == 4
