"""Files that hold a model in more than one way: with a moving average or without, in half precision, pickled, in parts."""

import json
import shlex

import pytest
import torch
from sd_files import random_sd, write_native

from xdiffusion.checkpoints.files import CheckpointError, save_safetensors
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.stable_diffusion import to_original
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.commands import sd
from xdiffusion.loading import STABLE_DIFFUSION, load_model

WEIGHTS = "diffusion_pytorch_model"
CONV_IN = "network.conv_in.weight"


def convert(line):
    sd.main(["convert", *shlex.split(line)])


@pytest.fixture
def folder(work_folder):
    """The folder of diffusers of sd21_v_tiny, in the current one."""
    write_native("sd21_v_tiny", work_folder / "native.safetensors")
    convert("native.safetensors folder --to diffusers")
    return work_folder / "folder"


def drawn_from(path, **choice):
    return load_model(path, **choice)[0].state_dict()[CONV_IN]


def test_of_a_folder_that_holds_its_unet_twice_the_average_is_read_if_not_told(folder, capsys):
    average = random_sd("sd21_v_tiny").state_dict()[CONV_IN]
    weights = folder / f"unet/{WEIGHTS}.safetensors"
    with pytest.raises(
        CheckpointError, match=r"unet holds its weights once, and does not say that they are a moving average"
    ):
        load_model(folder, ema=True)
    with pytest.raises(CheckpointError, match="unet holds no weights that are known to be no moving average"):
        load_model(folder, ema=False)
    plain = {name: tensor + 1 for name, tensor in StoredTensors(weights).items()}
    save_safetensors(weights.with_name(f"{WEIGHTS}.non_ema.safetensors"), plain, {"format": "pt"})
    for choice, expected in ((None, average), (True, average), (False, average + 1)):
        assert torch.equal(drawn_from(folder, ema=choice), expected)
    assert capsys.readouterr().err == ""
    weights.unlink()
    assert torch.equal(drawn_from(folder), average + 1)
    assert "non_ema.safetensors is read: without a moving average, since there is no other" in capsys.readouterr().err


def test_a_native_file_has_no_such_choice(folder):
    with pytest.raises(CheckpointError, match=r"native.safetensors holds one set of weights: --ema and --no-ema"):
        load_model("native.safetensors", ema=True)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_pickled_parts_of_a_component_are_read_by_their_index(folder, variant):
    weights = folder / f"unet/{WEIGHTS}.safetensors"
    stored = dict(StoredTensors(weights))
    weights.unlink()
    places = {name: f"{WEIGHTS}{variant}-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(stored)}
    for file in set(places.values()):
        torch.save({n: t.clone() for n, t in stored.items() if places[n] == file}, weights.with_name(file))
    index = weights.with_name(f"{WEIGHTS}.bin.index{variant}.json")
    index.write_text(json.dumps({"weight_map": places}))
    exact = random_sd("sd21_v_tiny").state_dict()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in load_model(folder)[0].state_dict().items())
    index.write_text(json.dumps({"weight_map": places | {next(iter(places)): "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names 'x.safetensors', which is no .bin file beside it"):
        load_model(folder)


def test_in_the_precision_of_the_file_its_tensors_are_taken_over(folder):
    convert("native.safetensors half.safetensors --to original --dtype float16")
    model, _ = load_model("half.safetensors", dtype=torch.float16)
    assert {p.dtype for p in model.network.parameters()} == {p.dtype for p in model.text_encoder.parameters()}
    dtypes = {name.partition(".")[0]: tensor.dtype for name, tensor in model.state_dict().items()}
    assert dtypes == {"network": torch.float16, "text_encoder": torch.float16, "autoencoder": torch.float32}
    stored = load_model_file(folder.parent / "half.safetensors").tensors
    assert torch.equal(model.state_dict()[CONV_IN], stored[CONV_IN])


def test_openclip_s_last_layer_survives_where_the_layout_has_a_place_for_it(work_folder, capsys):
    original = to_original(random_sd("sd21_v_tiny").state_dict(), "open_clip")
    last = {n.replace("resblocks.1.", "resblocks.23."): t + 1 for n, t in original.items() if "resblocks.1." in n}
    save_safetensors(work_folder / "sd21_v.safetensors", original | last, {})
    convert("sd21_v.safetensors again.safetensors --to original --dtype float16")
    again = StoredTensors(work_folder / "again.safetensors")
    assert all(torch.equal(again[name], tensor.half()) for name, tensor in last.items())
    assert "left out" not in capsys.readouterr().err
    for layout, output in (("native", "native.safetensors"), ("diffusers", "folder")):
        convert(f"sd21_v.safetensors {output} --to {layout}")
        assert "left out: 16 tensors of sd21_v.safetensors which no picture depends on" in capsys.readouterr().err


def test_the_config_of_another_model_is_told_from_damage(work_folder):
    save_safetensors(
        work_folder / "v2-1_512.safetensors", to_original(random_sd("sd21_base_tiny").state_dict(), "open_clip"), {}
    )
    message = r"v2-1_512.safetensors is sd21_base_tiny by its first layers; it is damaged, or the config is for another"
    with pytest.raises(CheckpointError, match=message):
        load_model("v2-1_512.safetensors", STABLE_DIFFUSION / "sd15_tiny.yaml")


def test_a_file_that_is_not_there_names_those_of_similar_names(work_folder):
    for name in (*(f"v2-1_{i}" for i in range(512, 520)), "anything_else_altogether"):
        (work_folder / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"v2-1_521.safetensors; there are: ") as error:
        load_model("v2-1_521.safetensors")
    assert str(error.value).count(", ") == 4
    assert "anything" not in str(error.value)
