"""What a LoRA was trained to predict, and on which schedule, is not lost on its way through the commands."""

import pytest
from commands import files_in
from lora_cases import command, factors
from sd_files import write_native

from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, unsaid, write_lora
from xdiffusion.checkpoints.lora_formats.native import trained_config
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.commands import sd
from xdiffusion.loading import load_model
from xdiffusion.training.exports import export_lora

LAYER = "network.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
SCHEDULE = "diffusion.schedule.zero_terminal_snr"


@pytest.fixture
def files(work_folder):
    """The current folder: model.safetensors, which predicts eps, and LoRAs of it that were trained to predict eps and v."""
    write_native("sd15_tiny", work_folder / "model.safetensors")
    for seed, prediction in enumerate(("eps", "v")):
        schedule = {"kind": "betas", "zero_terminal_snr": prediction == "v"}
        config = {"diffusion": {"prediction": prediction, "schedule": schedule}}
        lora = LoRAFile({LAYER: factors((32, 32), seed=seed)}, config=config)
        write_lora(lora, work_folder / f"{prediction}.safetensors", "native")
    return work_folder


@pytest.mark.parametrize(
    "line",
    [
        "lora apply model.safetensors v.safetensors:0.5 out.safetensors",
        "lora_add model.safetensors v.safetensors out.safetensors 0.5 upl",
        "lora_add model.safetensors v.safetensors out.safetensors 0.5 upl-ckpt-v2",
        "lora_add model.safetensors v.safetensors out.ckpt 0.5 upl-ckpt-v2",
    ],
)
def test_a_model_with_a_lora_folded_in_draws_as_the_lora_was_trained(files, line, capsys):
    assert command(line) == 0
    assert "v.safetensors was trained with diffusion.prediction=v, and is drawn so" in capsys.readouterr().err
    model, config = load_model(line.split()[-1] if "apply" in line else line.split()[3])
    assert (model.prediction, config.diffusion.schedule.zero_terminal_snr) == ("v", True)
    assert command(line.replace("v.safetensors", "eps.safetensors", 1)) == 0
    assert "was trained with" not in capsys.readouterr().err


def test_where_the_base_s_layout_cannot_say_it(files, capsys):
    sd.main(["convert", "model.safetensors", "folder", "--to", "diffusers"])
    before = files_in(files)
    assert command("lora_add folder v.safetensors out 0.5 upl") == 2
    err = capsys.readouterr().err
    assert "v.safetensors was trained with diffusion.prediction=v, folder says eps" in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "upl-ckpt-v2" in err
    assert files_in(files) == before
    assert command("lora_add folder eps.safetensors out 0.5 upl") == 0
    assert "was trained with" not in capsys.readouterr().err
    assert command("lora_add folder/unet v.safetensors unet 0.5 upl") == 0
    assert "v.safetensors was trained with diffusion.prediction=v, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["lora merge v.safetensors:0.5 eps.safetensors:0.5", "lora_add v.safetensors eps.safetensors"]
)
def test_loras_that_were_trained_otherwise_are_not_merged(files, words, capsys):
    before = files_in(files)
    assert command(f"{words} out.safetensors") == 2
    err = capsys.readouterr().err
    assert "diffusion.prediction=v in v.safetensors, eps in eps.safetensors" in err and err.count("\n") == 1
    assert files_in(files) == before


def test_an_extracted_lora_predicts_what_the_tuned_model_does(files):
    assert command("lora apply model.safetensors v.safetensors tuned.safetensors") == 0
    assert command("lora extract tuned.safetensors model.safetensors found.safetensors --rank 2") == 0
    assert trained_config(files / "found.safetensors") == load_model_file(files / "tuned.safetensors").config
    assert trained_config(files / "found.safetensors")["diffusion"]["prediction"] == "v"


def test_exports_say_it_or_a_line_does(files, capsys):
    export_lora(files / "v.safetensors")
    err = capsys.readouterr().err
    assert "v-diffusers.safetensors" in err and "v-kohya" not in err
    assert f"diffusion.prediction=v, {SCHEDULE}=True" in err and err.count("\n") == 1
    header = load_safetensors(files / "v-kohya.safetensors")[1]
    assert (header["modelspec.prediction_type"], header["ss_zero_terminal_snr"]) == ("v", "True")
    export_lora(files / "eps.safetensors")
    assert capsys.readouterr().err == ""
    header = load_safetensors(files / "eps-kohya.safetensors")[1]
    assert (header["modelspec.prediction_type"], header["ss_zero_terminal_snr"]) == ("epsilon", "False")
    assert command("lora convert v.safetensors v_peft --to peft") == 0
    assert "v_peft: it was trained with diffusion.prediction=v" in capsys.readouterr().err


def test_a_prediction_that_kohya_has_no_word_for(files, capsys):
    config = {"diffusion": {"prediction": "x0"}}
    lora = LoRAFile({LAYER: factors((32, 32))}, config=config)
    write_lora(lora, files / "x0.safetensors", "native")
    assert command("lora convert x0.safetensors out.safetensors --to kohya") == 0
    assert "diffusion.prediction=x0, which kohya has no word for" in capsys.readouterr().err
    header = load_safetensors(files / "out.safetensors")[1]
    assert "modelspec.prediction_type" not in header


def test_nothing_is_told_of_what_every_reader_takes_for_granted():
    """All of Stable Diffusion's own schedule, whatever keys it has."""
    usual = {"kind": "betas", "num_timesteps": 1000, "spacing": "scaled_linear", "beta_end": 0.012}
    config = {"diffusion": {"prediction": "eps", "schedule": usual | {"zero_terminal_snr": False}}}
    lora = LoRAFile({LAYER: factors((32, 32))}, config=config | {"model": {"text_encoder": {"clip_skip": 1}}})
    assert [unsaid(lora, format) for format in FORMATS] == [[]] * len(FORMATS)


@pytest.mark.parametrize(("config", "code"), [({"diffusion": []}, 0), ({"diffusion": {"schedule": "x"}}, 2)])
def test_a_header_that_is_no_config_is_no_crash(files, config, code, capsys):
    write_lora(LoRAFile({LAYER: factors((32, 32))}, config=config), files / "odd.safetensors", "native")
    assert command("lora apply model.safetensors odd.safetensors out.safetensors") == code
    assert capsys.readouterr().err.count("\n") == (code == 2)
