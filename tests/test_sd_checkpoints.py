"""Stable Diffusion's files: the original names, both ways, and recognising what stands at a path."""

import json
import random
import re

import pytest
import torch
from damage import mutated
from sd_files import EXTRA, FULL_SD, TINY_SD, random_sd, sd_config, text_names, write_native

from xdiffusion.build import build_model
from xdiffusion.checkpoints.diffusers import autoencoder_from_diffusers, autoencoder_to_diffusers
from xdiffusion.checkpoints.diffusers_folder import write_diffusers_folder
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.stable_diffusion import from_original, to_original, with_text_projection
from xdiffusion.checkpoints.stable_diffusion_files import MODELSPEC
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.weight_index import read_indexed
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.config_files import ConfigError
from xdiffusion.loading import STABLE_DIFFUSION, choices_of_run, load_model

PREDICTS, COMFY_PREDICTS = f"{MODELSPEC}prediction_type", f"{MODELSPEC}predict_key"
ARCHITECTURE = f"{MODELSPEC}architecture"
SAME = {  # a few names as everyone knows them
    "model.diffusion_model.time_embed.2.bias": "network.time_embedding.linear_2.bias",
    "model.diffusion_model.input_blocks.3.0.op.weight": "network.down_blocks.0.downsample.conv.weight",
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": "network.down_blocks.1.resnets.0.conv_shortcut.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias":
        "network.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.bias",
    "model.diffusion_model.output_blocks.2.1.conv.weight": "network.up_blocks.0.upsample.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.weight": "network.up_blocks.1.upsample.conv.weight",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight":
        "network.up_blocks.3.attentions.2.transformer_blocks.0.ff.proj_in.weight",
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight":
        "autoencoder.encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "first_stage_model.decoder.up.3.upsample.conv.bias": "autoencoder.decoder.up_blocks.0.upsample.conv.bias",
    "first_stage_model.decoder.mid.attn_1.q.weight": "autoencoder.decoder.mid_block.attentions.0.to_q.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.out_proj.weight":
        "text_encoder.layers.11.attn.to_out.weight",
}  # fmt: skip


def save(tensors, path, metadata=None):
    save_safetensors(path, tensors, metadata or {})


@pytest.mark.parametrize("name", FULL_SD[:2])
def test_the_original_names_are_a_bijection_at_full_size(name):
    with torch.device("meta"):
        ours = build_model(sd_config(name)).state_dict()
    original = to_original(ours, text_names(name))
    parts = [sum(n.startswith(p) for n in original) for p in ("model.diffusion_model.", "first_stage_model.")]
    assert parts == [686, 248]
    back = with_text_projection(from_original(original))
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}
    if name == "sd15":
        assert SAME.keys() <= original.keys()
        assert {from_original({n: original[n]}).popitem()[0] for n in SAME} == set(SAME.values())
        assert original["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    else:
        fused = original["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"]
        assert fused.shape == (3072, 1024)


@pytest.mark.parametrize("name", TINY_SD[:2])
def test_values_survive_both_ways(name):
    ours = random_sd(name).state_dict()
    back = with_text_projection(from_original(to_original(ours, text_names(name))))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[n], ours[n]) for n in ours)


def test_the_last_layer_of_openclip_and_what_is_no_weight_are_left_out():
    ours = random_sd("sd21_base_tiny").state_dict()
    original = to_original(ours, "open_clip")
    layer = {n.replace("resblocks.1.", "resblocks.23."): t for n, t in original.items() if "resblocks.1." in n}
    assert len(layer) == 12
    more = original | layer | EXTRA | {"cond_stage_model.model.logit_scale": torch.zeros(())}
    assert from_original(more).keys() == ours.keys()


def test_text_names_without_text_model_are_read():
    ours = random_sd("sd15_tiny").state_dict()
    original = {n.replace(".text_model.", "."): t for n, t in to_original(ours, "transformers").items()}
    assert with_text_projection(from_original(original)).keys() == ours.keys()


def test_old_names_of_diffusers_autoencoder_are_read():
    ours = {n.removeprefix("autoencoder."): t for n, t in random_sd("sd15_tiny").state_dict().items() if "autoenc" in n}
    old = {}
    for name, tensor in autoencoder_to_diffusers(ours).items():
        if ".attentions." in name:
            for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(f".{new}.", f".{before}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor
    assert sum(".proj_attn." in n for n in old) == 4
    back = autoencoder_from_diffusers(old)
    assert all(torch.equal(back.pop(n), ours[n]) for n in list(back))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_is_recognised_and_half_precision_becomes_whole(suffix, tmp_path):
    model = random_sd("sd15_tiny")
    original = {n: t.half() for n, t in to_original(model.state_dict(), "transformers").items()}
    path = tmp_path / f"v1-5-pruned-emaonly{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": original | EXTRA, "global_step": 3}, path)
    else:
        save(original | EXTRA, path)
    loaded, config = load_model(path)
    assert loaded.prediction == "eps"
    assert config == sd_config("sd15_tiny")
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    for (name, p), (_, exact) in zip(loaded.state_dict().items(), model.state_dict().items()):
        assert p.dtype == torch.float32
        assert p.stride() == exact.stride(), name
        assert torch.equal(p, exact.half().float())
    xt, time, context = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), loaded.text_encoder.encode(["a fox"])
    torch.testing.assert_close(loaded.network(xt, time, context), model.network(xt, time, context), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "metadata", "prediction", "noted"),
    [
        ("v2-1_768-ema-pruned", {}, "v", True),
        ("v2-1_512-ema-pruned", {}, "eps", True),
        ("tuned_v", {}, "v", True),
        ("tuned_v2", {}, "eps", True),
        ("tuned_v", {PREDICTS: "epsilon"}, "eps", False),
        ("tuned", {PREDICTS: "v"}, "v", False),
        ("tuned", {PREDICTS: "v_prediction"}, "v", False),
        ("tuned", {COMFY_PREDICTS: "v"}, "v", False),
        ("tuned_v", {COMFY_PREDICTS: "epsilon"}, "eps", False),
        ("tuned", {ARCHITECTURE: "stable-diffusion-v2-768-v"}, "v", False),
        ("tuned_v", {ARCHITECTURE: "stable-diffusion-v2-768-v", PREDICTS: "epsilon"}, "eps", False),
        ("tuned", {PREDICTS: "flow"}, "eps", True),
    ],
)
def test_what_a_2x_file_predicts_is_in_its_header_or_assumed_by_its_name(name, metadata, prediction, noted, tmp_path, capsys):
    path = tmp_path / f"{name}.safetensors"
    save(to_original(random_sd("sd21_v_tiny").state_dict(), "open_clip"), path, metadata)
    assert load_model(path)[0].prediction == prediction
    err = capsys.readouterr().err
    assert (f"taken to predict {prediction}, by its name; if not, --config_path" in err) == noted
    other = {"v": "sd21_base_tiny", "eps": "sd21_v_tiny"}[prediction]
    named, config = load_model(path, STABLE_DIFFUSION / f"{other}.yaml")
    assert named.prediction != prediction
    differing = [line for line in choices_of_run(config, load_model_file(path)) if "diffusion.prediction" in line]
    assert len(differing) == (not noted)  # a guess is nothing that a run could differ from


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [("resolution", "500x500", "sides are multiples of 8"), ("encoder_layer", "12", "text encoder has 2 layers")],
)
def test_what_a_header_says_and_the_model_cannot_have_is_ignored_and_told(key, value, why, tmp_path, capsys):
    path = tmp_path / "sd15.safetensors"
    save(to_original(random_sd("sd15_tiny").state_dict(), "transformers"), path, {f"{MODELSPEC}{key}": value})
    assert load_model(path)[1] == sd_config("sd15_tiny")
    assert re.search(rf"{path}: ignored modelspec.{key}={value}: its .*{why}", capsys.readouterr().err)


@pytest.fixture
def folder(tmp_path):
    file = load_model_file(write_native("sd21_v_tiny", tmp_path / "native.safetensors"))
    write_diffusers_folder(tmp_path / "sd21", file.tensors, file.config, {"!": 0}, ["a b"])
    return tmp_path / "sd21"


def test_a_folder_of_diffusers_is_read_with_its_scheduler(folder, capsys):
    model, config = load_model(folder)
    assert (model.prediction, config) == ("v", sd_config("sd21_v_tiny"))
    exact = random_sd("sd21_v_tiny").state_dict()
    assert all(torch.equal(t, exact[n]) for n, t in model.state_dict().items())
    assert capsys.readouterr().err == ""
    settings = folder / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps({"prediction_type": "flow_prediction"}))
    with pytest.raises(CheckpointError, match="prediction_type='flow_prediction'; allowed: epsilon"):
        load_model(folder)
    settings.write_text("{}")  # what is left out has diffusers' default
    diffusion = load_model(folder)[1].diffusion
    assert (diffusion.prediction, diffusion.schedule.spacing, diffusion.schedule.beta_end) == ("eps", "linear", 0.02)
    settings.unlink()
    assert load_model(folder)[0].prediction == "eps"
    assert "taken to predict eps, by its name; if not, --config_path" in capsys.readouterr().err


def test_pickled_and_fp16_weights_of_a_folder_are_found_and_missing_ones_told(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(dict(StoredTensors(weights)), folder / "unet/diffusion_pytorch_model.bin")
    weights.unlink()
    text = folder / "text_encoder/model.safetensors"
    text.rename(folder / "text_encoder/model.fp16.safetensors")
    exact = random_sd("sd21_v_tiny").state_dict()
    assert all(torch.equal(t, exact[n]) for n, t in load_model(folder)[0].state_dict().items())
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae holds no weights: looked for .*; there is config.json"):
        load_model(folder)


def write_sharded(weights, shards=3, variant=""):
    """Replace a safetensors file by several and an index, as diffusers and transformers name them; returns the index."""
    stored = dict(StoredTensors(weights))
    places = {}
    for i, name in enumerate(stored):
        places[name] = f"{weights.stem}{variant}-{i % shards + 1:05}-of-{shards:05}.safetensors"
    for file in set(places.values()):
        save({name: tensor for name, tensor in stored.items() if places[name] == file}, weights.with_name(file))
    weights.unlink()
    index = weights.with_name(f"{weights.stem}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_components_in_several_files_are_read_by_their_index(folder, variant):
    write_sharded(folder / "unet/diffusion_pytorch_model.safetensors", variant=variant)
    write_sharded(folder / "text_encoder/model.safetensors", 2, variant)
    exact = random_sd("sd21_v_tiny").state_dict()
    model, _ = load_model(folder)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.state_dict().items())


def test_shards_of_diffusers_own_are_read(folder, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    exact = random_sd("sd21_v_tiny").network.state_dict()
    assert all(torch.equal(t, exact[n]) for n, t in load_model(folder)[0].network.state_dict().items())


def test_an_index_that_does_not_fit_its_files_is_refused(folder, tmp_path):
    index = write_sharded(folder / "unet/diffusion_pytorch_model.safetensors")
    whole = json.loads(index.read_text())
    first = next(iter(whole["weight_map"]))
    save({first: torch.zeros(1)}, tmp_path / "elsewhere.safetensors")

    def refused(content, message):
        index.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)

    def naming(file):
        return {"weight_map": whole["weight_map"] | {first: file}}

    absolute, outside = str(tmp_path / "elsewhere.safetensors"), "../../elsewhere.safetensors"
    for file in (absolute, outside, "..\\elsewhere.safetensors", "C:elsewhere.safetensors", "..", "", "x.bin", 3, None):
        refused(naming(file), r"index.json names .*, which is no .safetensors file beside it")
    refused(naming(["x"]), r"index.json is damaged")
    refused(naming("gone.safetensors"), r"gone.safetensors is not there, which .*index.json names")
    refused(naming("a\0b.safetensors"), r"is not there, which")
    other = next(file for file in whole["weight_map"].values() if file != whole["weight_map"][first])
    refused(naming(other), rf"{other} has no tensor {first}, which .*index.json says is there")
    for content in ("", "[]", "{}", '{"weight_map": []}', "[" * 100_000, " " * (2**23 + 1)):
        refused(content, r"index.json is damaged")
    refused(naming("a" * 300 + ".safetensors"), "which is no .safetensors file beside it")
    with pytest.raises(CheckpointError) as error:
        index.write_text(json.dumps({"weight_map": {"a" * 10**5: other}}))
        load_model(folder)
    assert len(str(error.value)) < 500
    index.write_text(json.dumps(whole))
    (index.parent / other).unlink()
    with pytest.raises(CheckpointError, match=rf"{other} is not there, which .*index.json names"):
        load_model(folder)
    (index.parent / other).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=rf"{other} is not a whole safetensors file"):
        load_model(folder)


def test_a_damaged_index_ends_in_one_error(folder):
    index = write_sharded(folder / "unet/diffusion_pytorch_model.safetensors")
    content = index.read_bytes()
    refused = 0
    for seed in range(100):
        index.write_bytes(mutated(content, random.Random(seed)))
        try:
            read_indexed(index)
        except CheckpointError as error:
            assert str(index.parent) in str(error)
            refused += 1
    assert refused > 50


def test_other_models_and_damaged_files_are_refused(tmp_path):
    original = to_original(random_sd("sd15_tiny").state_dict(), "transformers")

    def refused(changes, message, without=()):
        save({n: t for n, t in (original | changes).items() if n not in without}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "x.safetensors")

    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    to_k = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    refused({conv_in: torch.zeros(16, 9, 3, 3)}, "9 input channels; known are 320/768, 320/1024")
    refused({to_k: torch.zeros(16, 2048)}, "2.x, but Stable Diffusion XL: .* first width 16, text width 2048")
    label = "model.diffusion_model.label_emb.0.0.weight"
    refused({label: torch.zeros(4)}, "no Stable Diffusion 1.x or 2.x, but the unCLIP of 2.1")
    refused({label: torch.zeros(4)}, "no Stable Diffusion 1.x or 2.x, but Stable Diffusion XL", without=[to_k])
    refused({label: torch.zeros(4), "conditioner.embedders.1.x": torch.zeros(4)}, "but Stable Diffusion XL")
    refused({}, "its UNet has no network.down_blocks.0.attentions", without=[to_k])
    norm = "first_stage_model.encoder.norm_out.weight"
    refused({}, r"x.safetensors is sd15_tiny by .* damaged, .*: autoencoder.encoder.conv_norm_out.weight", without=[norm])
    save(original, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut.safetensors is not a whole safetensors file"):
        load_model(tmp_path / "cut.safetensors")
    text = random_sd("sd21_base_tiny").state_dict()
    layer = "cond_stage_model.model.transformer.resblocks.0.ls_1.weight"
    save(to_original(text, "open_clip") | {layer: torch.zeros(4)}, tmp_path / "scaled.safetensors")
    with pytest.raises(CheckpointError, match=r"scaled.safetensors.* transformer.resblocks.0.ls_1.weight is of no layer"):
        load_model(tmp_path / "scaled.safetensors")
    save({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="carries no config"):
        load_model(tmp_path / "none.safetensors")


def test_writing_to_a_loaded_model_leaves_its_file_alone(tmp_path):
    path = write_native("sd15_tiny", tmp_path / "native.safetensors")
    before = path.read_bytes()
    model, _ = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
