"""The command `sd`, and `lora_add --mode upl-ckpt-v2`, as a user types them."""

import shlex

import pytest
import torch
from commands import files_in
from lora_cases import factors
from safetensors.torch import save_file
from sd_files import random_sd, write_native

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.checkpoints.stable_diffusion import from_original
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.cli import run
from xdiffusion.commands import lora, lora_add, sd
from xdiffusion.loading import STABLE_DIFFUSION, load_model


def command(line: str) -> int:
    name, *words = shlex.split(line)
    try:
        return run({"sd": sd.main, "lora_add": lora_add.main}[name], words)
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(params=["sd15_tiny", "sd21_v_tiny"])
def name(request, work_folder):
    """A model's name; the current folder holds its native file, model.safetensors."""
    write_native(request.param, work_folder / "model.safetensors")
    return request.param


def test_every_layout_holds_the_same_model(name, work_folder, capsys):
    for line in (
        "sd convert model.safetensors original.safetensors --to original",
        "sd convert original.safetensors folder --to diffusers",
        "sd convert folder original.ckpt --to original",
        f"sd convert original.ckpt native.safetensors --to native --config_path {STABLE_DIFFUSION / name}.yaml",
    ):
        assert command(line) == 0
    assert capsys.readouterr().out.startswith("original.safetensors: 775 tensors, original, from model.safetensors\n")
    exact = random_sd(name).state_dict()
    for path in ("original.safetensors", "folder", "native.safetensors"):
        model, config = load_model(work_folder / path)
        assert model.prediction == config.diffusion.prediction == ("v" if "_v" in name else "eps")
        assert all(torch.equal(tensor, exact[n]) for n, tensor in model.state_dict().items())
    assert {
        "model_index.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
    } <= files_in(work_folder / "folder")
    assert load_pickled(work_folder / "original.ckpt").keys() == {"state_dict"}


@pytest.mark.parametrize(
    ("model", "told"), [("sd15_tiny", ""), ("sd21_v_tiny", ""), ("sd21_base_tiny", "a model of v: give it config= a folder")]
)
def test_what_diffusers_takes_for_another_prediction_is_told(model, told, work_folder, capsys):
    write_native(model, work_folder / "model.safetensors")
    assert command("sd convert model.safetensors original.safetensors --to original") == 0
    err = capsys.readouterr().err
    assert told in err and ("from_single_file" in err) == bool(told)


@pytest.mark.parametrize("name", ["sd15_tiny"], indirect=True)
def test_a_weight_that_a_dtype_cannot_hold_is_named(name, work_folder, capsys):
    tensors, header = load_safetensors(work_folder / "model.safetensors")
    tensors = {n: tensor.bfloat16() for n, tensor in tensors.items()}
    tensors["network.conv_in.weight"][0] = 1e5
    save_file(tensors, work_folder / "large.safetensors", header)
    assert command("sd convert large.safetensors half.safetensors --to original --dtype float16") == 2
    assert "network.conv_in.weight has numbers of up to 9.98e+04, too large for --dtype float16" in capsys.readouterr().err
    assert not (work_folder / "half.safetensors").exists()


@pytest.mark.parametrize("name", ["sd15_tiny"], indirect=True)
def test_another_autoencoder_is_no_part_of_an_extracted_lora(name, work_folder, capsys):
    tensors, header = load_safetensors(work_folder / "model.safetensors")
    tensors = {n: tensor.clone() for n, tensor in tensors.items()}
    for changed in ("autoencoder.decoder.conv_out.weight", "network.conv_in.weight"):
        tensors[changed] += 1
    save_file(tensors, work_folder / "tuned.safetensors", header)
    line = "extract tuned.safetensors model.safetensors found.safetensors --rank 1 --to kohya"
    assert run(lora.main, line.split()) == 0
    assert "1 tensors differ that no LoRA changes (biases, norms, the autoencoder, ...), such as autoencoder." in (
        capsys.readouterr().out
    )
    assert list(read_lora(work_folder / "found.safetensors").modules) == ["unet.conv_in"]


@pytest.mark.parametrize("name", ["sd15_tiny"], indirect=True)
def test_dtype_changes_the_weights_and_no_output_takes_its_input_s_place(name, work_folder, capsys):
    assert command("sd convert model.safetensors half.safetensors --to original --dtype float16") == 0
    exact = random_sd(name).state_dict()
    stored = from_original(StoredTensors(work_folder / "half.safetensors"))
    assert all(torch.equal(tensor, exact[n].half()) for n, tensor in stored.items())
    before = (work_folder / "model.safetensors").read_bytes()
    assert command("sd convert model.safetensors ./model.safetensors --to original --dtype float16") == 2
    assert "model.safetensors would be overwritten, and is read: name another output" in capsys.readouterr().err
    assert (work_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["sd15_tiny"], indirect=True)
def test_a_mistake_is_one_line_and_writes_nothing(name, work_folder, capsys):
    (work_folder / "folder").mkdir()
    for line, message in (
        (
            "sd convert modle.safetensors out.safetensors --to native",
            "no checkpoint at modle.safetensors; there are: model",
        ),
        ("sd convert model.safetensors folder --to diffusers", "folder is there already; a folder is not overwritten"),
        ("sd convert model.safetensors out.txt --to original", "out.txt: an original file ends in .safetensors or .pt"),
        (
            "sd convert model.safetensors out.ckpt --to diffusers",
            "out.ckpt: diffusers' layout is a folder; name one without .ckpt",
        ),
        ("sd convert model.safetensors out.bin --to native", "out.bin: a native model is a .safetensors file"),
        ("sd convert model.safetensors out.safetensors --to kohya", "invalid choice: 'kohya'"),
    ):
        assert command(line) == 2
        assert message in capsys.readouterr().err
    assert files_in(work_folder) == {"model.safetensors", "folder"}


def test_a_model_that_the_layouts_have_no_words_for_is_refused(tiny_run, work_folder, capsys):
    for layout, output in (("original", "out.safetensors"), ("diffusers", "out")):
        assert command(f"sd convert {tiny_run.checkpoint} {output} --to {layout}") == 2
        assert f"model.autoencoder.kind=identity: {layout} knows kl only" in capsys.readouterr().err
    assert files_in(work_folder) == set()


def test_a_lora_is_folded_into_an_original_file(name, work_folder, capsys):
    exact = random_sd(name).state_dict()
    chosen = [
        n for n in exact if n.endswith(("attn1.to_q.weight", "layers.1.attn.to_v.weight", "mid_block.resnets.0.conv1.weight"))
    ]
    modules = {n.removesuffix(".weight"): factors(tuple(exact[n].shape), seed=i) for i, n in enumerate(chosen)}
    modules = {n: f for n, f in modules.items() if not n.startswith("autoencoder.")}
    write_lora(LoRAFile({exchange_name(n): f for n, f in modules.items()}), work_folder / "style.safetensors", "kohya")
    assert command("sd convert model.safetensors original.safetensors --to original") == 0
    for source in ("original.safetensors", "model.safetensors"):
        assert command(f"lora_add {source} style.safetensors out.safetensors 0.5 upl-ckpt-v2") == 0
        assert f"{source} + 0.5 * style.safetensors, {len(modules)} layers" in capsys.readouterr().out
        result = from_original(StoredTensors(work_folder / "out.safetensors"))
        for n, tensor in result.items():
            added = modules.get(n.removesuffix(".weight"))
            expected = exact[n] + 0.5 * added.delta() if added else exact[n]
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert any(n.startswith("text_encoder.") for n in modules)
