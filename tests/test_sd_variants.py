"""Files that hold a model in more than one way: with a moving average or without, in half precision, pickled, in parts."""

import json
import shlex
import shutil

import pytest
import torch
from sd_files import EXTRA, FULL_SD, random_sd, sd_config, text_names, write_native

from xdiffusion.build import build_model
from xdiffusion.checkpoints.diffusers import autoencoder_to_diffusers, unet_to_diffusers
from xdiffusion.checkpoints.diffusers_settings import config_from
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_formats.native import trained_config
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.stable_diffusion import from_original, to_original, with_text_projection
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.cli import run
from xdiffusion.commands import lora, sd
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


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "time_cond_proj_dim", 256, "time_cond_proj_dim=256; here it can only be None"),
        ("unet", "mid_block_type", None, "mid_block_type=None; here it can only be 'UNetMidBlock2DCrossAttn'"),
    ],
)
def test_settings_of_another_model_are_named_before_its_weights_are(part, key, value, message, folder):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"{part}/config\.json: {message}"):
        load_model(folder)


def test_heads_that_no_unet_here_has_are_named_by_whichever_key():
    for key in ("attention_head_dim", "num_attention_heads"):
        with pytest.raises(ValueError, match=r"attention_head_dim=\[5, 10, 20, 19\] at the widths"):
            config_from({"unet/config.json": {key: [5, 10, 20, 19]}}, 12)


def test_an_extracted_lora_predicts_what_a_tuned_folder_does(folder):
    tuned = folder.with_name("tuned")
    shutil.copytree(folder, tuned)
    scheduler = tuned / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"rescale_betas_zero_snr": True}))
    weights = tuned / f"unet/{WEIGHTS}.safetensors"
    changed = {n: t.clone() for n, t in StoredTensors(weights).items()}
    changed["conv_in.weight"] += 1
    save_safetensors(weights, changed, {"format": "pt"})
    assert run(lora.main, ["extract", "tuned", "folder", "found.safetensors", "--rank", "1"]) == 0
    said = trained_config(folder.with_name("found.safetensors"))["diffusion"]
    assert said["prediction"] == "v" and said["schedule"]["zero_terminal_snr"] is True


def test_of_a_folder_that_holds_its_unet_twice_the_average_is_read_if_not_told(folder, capsys):
    average = random_sd("sd21_v_tiny").state_dict()[CONV_IN]
    weights = folder / f"unet/{WEIGHTS}.safetensors"
    with pytest.raises(CheckpointError, match=r"unet holds its weights once, and does not say that they are a moving average"):
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


PARTS = ("first_stage_model", "cond_stage_model", "model.diffusion_model")


def linear_as_in_diffusers(name, tensor):
    """The attention of the autoencoder as diffusers' script left it in files of folders by diffusers 0.17 to 0.24."""
    kept = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    *place, layer, kind = name.split(".")
    return ".".join((*place, kept.get(layer, layer), kind)), tensor.flatten(1) if tensor.ndim == 4 else tensor


def convolved_biases(name, tensor):
    """The same as its next version wrote them: biases were given the weights' two dimensions, too."""
    return name, tensor if ".norm." in name or tensor.ndim > 1 else tensor[:, None, None]


@pytest.mark.parametrize("as_written", [linear_as_in_diffusers, convolved_biases])
def test_original_files_by_older_versions_of_diffusers_script_are_read(as_written):
    ours = random_sd("sd15_tiny").state_dict()
    original = to_original(ours, "transformers")
    written = dict(as_written(n, t) if ".mid.attn_1." in n else (n, t) for n, t in original.items())
    assert sum(n not in original or t.shape != original[n].shape for n, t in written.items()) in (8, 16)
    back = with_text_projection(from_original(written))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[n], ours[n]) for n in ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_layout_of_sd_turbo_is_that_of_2_1_by_another_name(suffix, work_folder):
    ours = random_sd("sd21_base_tiny").state_dict()
    original = to_original(ours, "open_clip")
    turbo = {name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor for name, tensor in original.items()}
    path = work_folder / f"sd_turbo{suffix}"
    save_safetensors(path, turbo, {}) if suffix == ".safetensors" else torch.save({"state_dict": turbo}, path)
    model, config = load_model(path)
    assert config.diffusion.prediction == "eps"
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


def without_prefix(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        (PARTS[:1], "autoencoder"),
        (PARTS[1:2], "text encoder"),
        (PARTS[:2], "text encoder and no autoencoder"),
    ],
)
def test_a_pruned_file_is_not_called_damaged(left_out, missing, suffix, work_folder):
    path = work_folder / f"pruned{suffix}"
    whole = to_original(random_sd("sd15_tiny").state_dict(), "transformers")
    left = {name: tensor for name, tensor in whole.items() if not name.startswith(left_out)}
    torch.save({"state_dict": left}, path) if suffix == ".ckpt" else save_safetensors(path, left, {})
    for config_path in (None, STABLE_DIFFUSION / "sd15_tiny.yaml"):
        with pytest.raises(CheckpointError, match=f"{path} holds no {missing}; take a whole checkpoint"):
            load_model(path, config_path)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (lambda original, _: without_prefix(original, f"{PARTS[2]}."), "a UNet"),
        (lambda original, _: without_prefix(original, f"{PARTS[0]}."), "an autoencoder"),
        (lambda original, _: without_prefix(original, "cond_stage_model.transformer."), "a text encoder"),
        (lambda original, _: {n: t for n, t in original.items() if n.startswith(PARTS[0])}, "an autoencoder"),
        (lambda _, ours: unet_to_diffusers(without_prefix(ours, "network.")), "a UNet"),
        (lambda _, ours: autoencoder_to_diffusers(without_prefix(ours, "autoencoder.")), "an autoencoder"),
    ],
    ids=[
        "UNet",
        "autoencoder",
        "text encoder",
        "autoencoder as named in a whole file",
        "diffusers' UNet",
        "its autoencoder",
    ],
)
def test_a_part_alone_is_called_so(part, what, work_folder):
    path, ours = work_folder / "part.safetensors", random_sd("sd15_tiny").state_dict()
    save_safetensors(path, part(to_original(ours, "transformers"), ours), {})
    for config_path in (None, STABLE_DIFFUSION / "sd15_tiny.yaml"):
        with pytest.raises(CheckpointError, match=f"{path} is {what} alone; take a whole checkpoint"):
            load_model(path, config_path)


def test_a_file_that_is_not_there_names_those_of_similar_names(work_folder):
    for name in (*(f"v2-1_{i}" for i in range(512, 520)), "anything_else_altogether"):
        (work_folder / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"v2-1_521.safetensors; there are: ") as error:
        load_model("v2-1_521.safetensors")
    assert str(error.value).count(", ") == 4
    assert "anything" not in str(error.value)


def test_the_moving_average_is_a_choice(tmp_path):
    original = to_original(random_sd("sd15_tiny").state_dict(), "transformers")
    unet = {n: t for n, t in original.items() if n.startswith("model.")}
    ema = {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema
    save_safetensors(tmp_path / "both.safetensors", original | ema | EXTRA, {})
    plain, average = (load_model_file(tmp_path / "both.safetensors", ema=e).tensors for e in (False, True))
    assert plain.keys() == average.keys()
    for name in plain:
        assert torch.equal(average[name], plain[name] + 1 if name.startswith("network.") else plain[name])
    save_safetensors(tmp_path / "one.safetensors", original, {})
    with pytest.raises(CheckpointError, match=r"one.safetensors: the file holds the moving average of 0 of"):
        load_model_file(tmp_path / "one.safetensors", ema=True)


def averaged(original):
    """A file's tensors with the UNet as a moving average alone."""

    def renamed(name):
        return "model_ema." + name.removeprefix("model.").replace(".", "") if name.startswith("model.") else name

    return {renamed(name): tensor for name, tensor in original.items()}


@pytest.mark.parametrize("name", FULL_SD[:2])
def test_every_name_of_a_moving_average_is_known_at_full_size(name):
    with torch.device("meta"):
        original = to_original(build_model(sd_config(name)).state_dict(), text_names(name))
    assert from_original(averaged(original), ema=True).keys() == from_original(original).keys()


def test_a_moving_average_alone_is_read_and_told(tmp_path, capsys):
    exact = random_sd("sd15_tiny").state_dict()
    path = tmp_path / "average.safetensors"
    save_safetensors(path, averaged(to_original(exact, "transformers")) | EXTRA, {})
    for choice, told in ((None, True), (True, False)):
        tensors = load_model(path, ema=choice)[0].state_dict()
        assert all(torch.equal(tensors[n], exact[n]) for n in exact)
        assert (f"{path} is read: with the moving average of its UNet" in capsys.readouterr().err) == told
    with pytest.raises(CheckpointError, match=r"average.safetensors holds nothing of its UNet but a moving average"):
        load_model_file(path, ema=False)
