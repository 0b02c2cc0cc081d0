"""What shapes do not tell, above all the prediction and the schedule: through every layout, and as diffusers draws."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from sd_files import TINY_SD, random_sd, sd_config, write_native
from transformers import CLIPTokenizer

from xdiffusion.build import build_sampling, override
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.reading import load_pickled
from xdiffusion.commands import sd
from xdiffusion.config_files import ConfigError
from xdiffusion.loading import ARCHITECTURE, CHOICES, config_differences, load_model
from xdiffusion.model import generate, generators_for

PROMPT = "a fox in the snow"
OTHERS = ["diffusion.schedule.beta_start=0.001", "diffusion.schedule.spacing=linear", "diffusion.schedule.num_timesteps=500",
          "model.autoencoder.scale_factor=0.5", "model.text_encoder.clip_skip=2", "model.network.norm_groups=8",
          "model.text_encoder.pad_with_end_token=true", "data.image_size=128"]  # fmt: skip
PROCESSES = [("eps", False), ("v", False), ("v", True), ("x0", False), ("x0", True)]


def changed(name, *assignments):
    return override(sd_config(name), assignments, "test")


def written(name, config, folder):
    """The model of that name with another config, as a folder of diffusers."""
    native = write_native(name, folder / "native.safetensors", config)
    sd.main(["convert", str(native), str(folder / "folder"), "--to", "diffusers"])
    return folder / "folder"


def assert_drawn_as_by_diffusers(folder, spacing="leading"):
    """In two steps, with the scheduler of the folder as it is."""
    model, config = load_model(folder)
    words = f"sampler.kind=ddim times.kind=timesteps times.spacing={spacing} times.last=first steps=2 prompt_syntax=plain"
    config = override(config, [f"sampling.{word}" for word in words.split()], "test")
    ours = generate(model, [PROMPT], generators_for(0, 1), **build_sampling(config, model.schedule))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, num_inference_steps=2, generator=generators_for(0, 1), output_type="pt").images * 2 - 1
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", TINY_SD)
@pytest.mark.parametrize(("prediction", "zero_terminal_snr"), PROCESSES)
def test_prediction_and_schedule_survive_and_draw_as_in_diffusers(name, prediction, zero_terminal_snr, tmp_path):
    """Weights of one network read in five ways are five models: nothing in their shapes tells them apart."""
    schedule = f"diffusion.schedule.zero_terminal_snr={str(zero_terminal_snr).lower()}"
    config = changed(name, f"diffusion.prediction={prediction}", schedule)
    folder = written(name, config, tmp_path)
    words = ["convert", str(folder), str(tmp_path / "original.safetensors"), "--to", "original"]
    if prediction == "x0":
        with pytest.raises(CheckpointError, match=r"diffusion.prediction=x0: original has no word for it"):
            sd.main(words)
    else:
        sd.main(words)
        assert load_model(tmp_path / "original.safetensors")[1] == config
    assert load_model(folder)[1] == config
    assert_drawn_as_by_diffusers(folder, "trailing" if zero_terminal_snr else "leading")


def test_a_pickled_file_says_that_it_predicts_v_by_two_empty_tensors(tmp_path):
    config = changed("sd15_tiny", "diffusion.prediction=v", "diffusion.schedule.zero_terminal_snr=true")
    native = write_native("sd15_tiny", tmp_path / "native.safetensors", config)
    sd.main(["convert", str(native), str(tmp_path / "out.ckpt"), "--to", "original"])
    assert {"v_pred", "ztsnr"} <= load_pickled(tmp_path / "out.ckpt")["state_dict"].keys()
    assert load_model(tmp_path / "out.ckpt")[1] == config


def test_a_file_of_2x_that_would_be_taken_for_another_by_its_name_is_not_written(tmp_path):
    native = write_native("sd21_base_tiny", tmp_path / "native.safetensors")
    with pytest.raises(CheckpointError, match=r"prediction=eps: original has no word .*_v.ckpt would be read with v"):
        sd.main(["convert", str(native), str(tmp_path / "mine_v.ckpt"), "--to", "original"])
    sd.main(["convert", str(native), str(tmp_path / "mine.ckpt"), "--to", "original"])
    assert load_model(tmp_path / "mine.ckpt")[0].prediction == "eps"


@pytest.mark.parametrize("name", TINY_SD[:2])
def test_all_other_settings_are_in_a_folder(name, tmp_path):
    config = changed(name, *OTHERS)
    folder = written(name, config, tmp_path)
    model, read = load_model(folder)
    assert not list(config_differences(config, read, (*ARCHITECTURE, *CHOICES)))
    exact = random_sd(name).state_dict()
    assert all(torch.equal(tensor, exact[n]) for n, tensor in model.state_dict().items())
    assert_drawn_as_by_diffusers(folder)


@pytest.mark.parametrize("padding", ["!", {"content": "!", "lstrip": False}, "<|endoftext|>", None])
@pytest.mark.parametrize("listed", [False, True])
def test_prompts_are_padded_as_transformers_pads_them(listed, padding, tmp_path, capsys):
    """Stability's own folders of 2.x name the end token in one file and the exclamation mark in the other."""
    folder = written("sd21_base_tiny", sd_config("sd21_base_tiny"), tmp_path)
    settings = folder / "tokenizer/tokenizer_config.json"
    said = json.loads(settings.read_text()) | {"pad_token": "<|endoftext|>"}
    said |= {"added_tokens_decoder": {"0": {"content": "!"}, "49407": {"content": "<|endoftext|>"}}} if listed else {}
    settings.write_text(json.dumps(said))
    special = {"bos_token": "<|startoftext|>"} | ({"pad_token": padding} if padding else {})
    settings.with_name("special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = CLIPTokenizer.from_pretrained(settings.parent)
    theirs = tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    model, config = load_model(folder)
    assert torch.equal(model.text_encoder.tokenize([PROMPT]), theirs)
    told = f"{folder} says model.text_encoder.pad_with_end_token=True" in capsys.readouterr().err
    assert told == config.model.text_encoder.pad_with_end_token


@pytest.mark.parametrize("other", [*OTHERS[:4], "model.network.norm_groups=2"])
def test_what_an_original_file_cannot_say_is_refused(other, tmp_path):
    native = write_native("sd15_tiny", tmp_path / "native.safetensors", changed("sd15_tiny", other))
    with pytest.raises(CheckpointError, match=f"{other.partition('=')[0]}.*original has no word for it"):
        sd.main(["convert", str(native), str(tmp_path / "out.safetensors"), "--to", "original"])
    assert not (tmp_path / "out.safetensors").exists()


def test_clip_skip_and_size_are_in_the_header_of_an_original_file(tmp_path, capsys):
    config = changed("sd15_tiny", "model.text_encoder.clip_skip=2", "data.image_size=128")
    native = write_native("sd15_tiny", tmp_path / "native.safetensors", config)
    sd.main(["convert", str(native), str(tmp_path / "out.safetensors"), "--to", "original"])
    assert load_model(tmp_path / "out.safetensors")[1] == config
    assert "out.safetensors says model.text_encoder.clip_skip=2" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"clip_skip=2: original has no word for it, and .*out.ckpt would be"):
        sd.main(["convert", str(native), str(tmp_path / "out.ckpt"), "--to", "original"])


def test_eps_without_a_signal_to_predict_it_from_is_refused():
    with pytest.raises(ConfigError, match="nothing but noise is left"):
        changed("sd15_tiny", "diffusion.schedule.zero_terminal_snr=true")
