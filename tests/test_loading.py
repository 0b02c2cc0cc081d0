"""Checkpoints only meet configs of their own architecture, and become models without a second copy of their weights."""

import re
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from xdiffusion.as_trained import as_trained
from xdiffusion.build import build_model, build_sampling, load_config
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.config_files import ConfigError
from xdiffusion.loading import check_same_architecture, choices_of_run, load_model, load_weights
from xdiffusion.model import generate, generators_for

TINY = """
data: {kind: image/digits, image_size: 8}
model:
  network: {kind: unet, channels: [8, 8], transformer_depth: [0, 1], num_res_blocks: 1, head_dim: 8, norm_groups: 4}
  text_encoder: {kind: clip, width: 8, layers: 1, heads: 2, context_length: 6, pretrained: null}
diffusion: {prediction: v}
sampling: {steps: 3}
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def config(config_path):
    """config("key=value", ...) is the tiny config with overrides."""
    return lambda *overrides: load_config(config_path, overrides)


@pytest.fixture
def saved(config, tmp_path):
    """A tiny model and the path of its checkpoint."""
    torch.manual_seed(3)
    model = build_model(config())
    path = tmp_path / "diffusion-7.safetensors"
    save_model(path, model.state_dict(), config=OmegaConf.to_container(config()), image_shape=(1, 8, 8), step=7)
    return model.eval(), path


def test_a_checkpoint_alone_gives_the_model_back(saved, config, config_path):
    model, path = saved
    for loaded, its_config in (load_model(path), load_model(path, config_path), load_model(path.with_suffix(".pt"))):
        assert its_config == config()
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    sampling = build_sampling(config(), model.schedule)
    images = [generate(m, ["1", "2"], generators_for(0, 2), **sampling) for m in (model, loaded)]
    assert torch.equal(*images)


def test_how_an_older_version_trained_it_does_not_matter(saved, config, tmp_path):
    """What a header says of training is a record: keys that are gone do no harm, but for the model's own."""
    model, _ = saved
    content = OmegaConf.to_container(config())
    content["training"]["cache_latents"] = True
    content |= {"clip": {"steps": 600}, "optimizer": "adam"}
    save_model(tmp_path / "older.safetensors", model.state_dict(), config=content, image_shape=(1, 8, 8), step=7)
    _, its_config = load_model(tmp_path / "older.safetensors")
    assert its_config.training == config().training
    check_same_architecture(config(), load_model_file(tmp_path / "older.safetensors"))
    content["model"]["network"]["wings"] = 2
    save_model(tmp_path / "other.safetensors", model.state_dict(), config=content, image_shape=(1, 8, 8), step=7)
    with pytest.raises(ConfigError, match=r"other.safetensors: model.network.wings is unknown"):
        load_model(tmp_path / "other.safetensors")


def test_a_pickled_state_dict_needs_the_config(saved, config_path, tmp_path):
    model, _ = saved
    path = tmp_path / "plain.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ConfigError, match=r"plain\.pt carries no config: name it with --config_path"):
        load_model(path)
    loaded, _ = load_model(path, config_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.network.channels=[8,16]", "model.network.channels=[8, 8] there, [8, 16] in the config"),
        ("model.text_encoder.context_length=7", "model.text_encoder.context_length=6 there, 7"),
        ("diffusion.prediction=eps", "diffusion.prediction=v there, eps in the config"),
        ("diffusion.schedule.kind=betas", "diffusion.schedule.kind=cosine there, betas"),
        ("data.image_size=16", "for images (1, 8, 8), the config for (1, 16, 16)"),
        ("data.kind=image/cifar10", "for images (1, 8, 8), the config for (3, 8, 8)"),
    ],
)
def test_another_model_is_refused_with_the_key_that_differs(saved, config, tmp_path, override, difference):
    _, path = saved
    file, chosen = load_model_file(path), override.startswith("diffusion.")
    with nullcontext() if chosen else pytest.raises(CheckpointError, match=f"{path} is .*{re.escape(difference)}"):
        check_same_architecture(config(override), file)
    if chosen:  # may be another on purpose, of a run that begins with these weights
        assert difference in choices_of_run(config(override), file)[0]

    other = tmp_path / "other.yaml"
    other.write_text(OmegaConf.to_yaml(config(override)))
    with pytest.raises(CheckpointError, match=rf"{path} is .*{re.escape(difference)}"):
        load_model(path, other)


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size=2",
        "sampling.steps=9",
        "model.text_encoder.pretrained=tiny",
        "data.kind=image/digits_inverted",
    ],
)
def test_what_is_no_architecture_may_differ(saved, config, override):
    check_same_architecture(config(override), load_model_file(saved[1]))


def test_the_section_sampling_of_the_named_config_is_used(saved, config, tmp_path, capsys):
    path, other = saved[1], tmp_path / "other.yaml"
    content = OmegaConf.to_container(config())
    content["sampling"] = {"steps": 4, "sampler": {"kind": "heun"}}
    other.write_text(OmegaConf.to_yaml(content))
    sampling = load_model(path, other)[1].sampling
    assert (sampling.steps, sampling.sampler.kind, sampling.cfg_scale) == (4, "heun", config().sampling.cfg_scale)
    said = capsys.readouterr().err
    assert f"{other} beats the checkpoint: sampling.steps=4 (3 there), sampling.sampler.kind=heun (ddim there)\n" in said
    del content["sampling"]
    other.write_text(OmegaConf.to_yaml(content))
    assert load_model(path, other)[1] == config()
    assert capsys.readouterr().err == ""


def test_a_key_that_is_younger_than_the_file_has_its_default_there(saved, config):
    model, path = saved
    plain = OmegaConf.to_container(config())
    for key in ("clip_skip", "pad_with_end_token"):
        del plain["model"]["text_encoder"][key]
    save_model(path, model.state_dict(), config=plain, image_shape=(1, 8, 8), step=7)
    check_same_architecture(config(), load_model_file(path))
    with pytest.raises(CheckpointError, match=r"pad_with_end_token=False there, True in the config"):
        check_same_architecture(config("model.text_encoder.pad_with_end_token=true"), load_model_file(path))


def test_weights_that_do_not_fit_their_own_config_are_refused(saved, config, tmp_path):
    model, path = saved
    tensors = dict(model.state_dict())
    removed = tensors.pop("network.conv_in.weight")
    header = {"config": OmegaConf.to_container(config()), "image_shape": (1, 8, 8), "step": 1}
    save_model(path, tensors, **header)
    with pytest.raises(CheckpointError, match=r"another architecture: .*network\.conv_in\.weight"):
        load_model(path)
    save_model(path, tensors | {"network.conv_in.weight": removed[:4]}, **header)
    with pytest.raises(CheckpointError, match=r"conv_in.weight is \(4, 1, 3, 3\) there, \(8, 1, 3, 3\) by the config"):
        load_model(path)


def test_a_config_inside_a_checkpoint_is_checked_like_any_other(saved, config):
    model, path = saved
    theirs = OmegaConf.to_container(config())
    theirs["model"]["network"]["chanels"] = theirs["model"]["network"].pop("channels")
    save_model(path, model.state_dict(), config=theirs, image_shape=(1, 8, 8), step=7)
    with pytest.raises(ConfigError, match=r"diffusion-7\.safetensors: .*did you mean channels\?"):
        load_model(path)


def test_tensors_are_taken_over_as_they_lie_in_the_file_where_dtype_and_layout_allow(saved, config):
    model, path = saved
    file = load_model_file(path)
    mapped = {name: tensor.data_ptr() for name, tensor in file.tensors.items()}
    loaded = build_model(config(), without_weights=True)
    load_weights(loaded, file)
    for name, tensor in loaded.state_dict().items():
        assert tensor.stride() == model.state_dict()[name].stride()
        assert (tensor.data_ptr() == mapped[name]) == tensor.is_contiguous() or tensor.ndim == 4


@pytest.mark.parametrize("mapped", [True, False])
def test_copies_stay_whatever_becomes_of_the_file(mapped, saved, config):
    """`cp other.safetensors base.safetensors` writes into the file that a run may have mapped."""
    model, path = saved
    loaded = build_model(config(), without_weights=True)
    load_weights(loaded, load_model_file(path), mapped=mapped)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    pairs = list(zip(loaded.state_dict().values(), model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in pairs) == (not mapped)


def test_a_model_that_has_weights_keeps_its_own_memory(saved, config):
    model, path = saved
    other = build_model(config())
    before = [p.data_ptr() for p in other.parameters()]
    load_weights(other, load_model_file(path))
    assert [p.data_ptr() for p in other.parameters()] == before
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


def test_another_kind_of_schedule_is_one_line(saved, config, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    factors = LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    write_lora(LoRAFile({"a": factors}, config=OmegaConf.to_container(config("diffusion.schedule.kind=betas"))), path, "native")
    assert as_trained(config(), [path]).diffusion.schedule.kind == "betas"
    said = "was trained with diffusion.schedule.kind=betas, and is drawn so but for flags; its base has cosine"
    assert capsys.readouterr().err == f"{path} {said}\n"
