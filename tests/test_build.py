"""Names in a config become the objects they promise, and checkpoints only meet configs of their own architecture."""

import inspect
from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf

from xdiffusion import build
from xdiffusion.build import (
    SCHEMA,
    build_data,
    build_model,
    build_sampling,
    build_schedule,
    check_same_architecture,
    image_shape,
    load_config,
    load_model,
)
from xdiffusion.checkpoints.files import CheckpointError
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.config import ConfigError, Section, Slot
from xdiffusion.data.captions import PROMPT_TABLES
from xdiffusion.model import generate, generators_for
from xdiffusion.samplers.ddim import sample_ddim
from xdiffusion.samplers.time_grids import logsnr_times
from xdiffusion.signatures import REQUIRED, signature

TINY = """
data: {kind: image/digits, image_size: 8}
model:
  network: {kind: unet, channels: [8, 8], transformer_depth: [0, 1], num_res_blocks: 1, head_dim: 8, norm_groups: 4}
  text_encoder: {kind: clip, width: 8, layers: 1, heads: 2, context_length: 6, pretrained: null}
diffusion: {prediction: v}
sampling: {steps: 3}
"""
SLOTS = ("DATASETS", "NETWORKS", "TEXT_ENCODERS", "AUTOENCODERS", "SCHEDULES", "SAMPLERS", "TIME_GRIDS")
TARGETS = sorted({target for slot in SLOTS for target in getattr(build, slot).values()})


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def config(config_path):
    """config("key=value", ...) is the tiny config with overrides."""
    return lambda *overrides: load_config(config_path, overrides)


def sections(children=SCHEMA):
    for child in children.values():
        yield child
        yield from sections(child.children) if isinstance(child, Section) else ()


# --- the dictionaries ---


@pytest.mark.parametrize("target", [*TARGETS, *(s.target for s in sections() if getattr(s, "target", None))])
def test_a_target_is_importable_and_has_the_signature_that_was_read(target):
    module, name = target.split(":")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    expected = {n: REQUIRED if p.default is inspect.Parameter.empty else p.default for n, p in parameters.items()}
    found = {n: p.default for n, p in signature(target).items()}
    assert list(found) == list(expected)
    assert found == {n: list(d) if isinstance(d, tuple) else d for n, d in expected.items()}


def test_what_the_program_fills_in_are_arguments_of_every_target():
    for section in sections():
        targets = section.kinds.values() if isinstance(section, Slot) else [getattr(section, "target", None)]
        for target in filter(None, targets):
            assert getattr(section, "injected", set()) <= set(signature(target)), target


def test_every_data_set_has_channels_and_captions():
    assert set(build.DATASETS) == set(build.IMAGE_CHANNELS) == set(PROMPT_TABLES)


# --- models ---


@pytest.mark.parametrize(
    ("kind", "channels"), [("image/digits", 1), ("image/cifar10", 3), ("image/cifar10_inverted", 3)]
)
def test_shared_sizes_are_read_off_the_built_parts(config, kind, channels):
    tiny = config(f"data.kind={kind}", "model.text_encoder.width=12", "model.text_encoder.heads=3")
    model = build_model(tiny)
    assert model.image_shape == image_shape(tiny) == (channels, 8, 8)
    assert model.autoencoder.latent_channels == channels
    assert model.text_encoder.encode(["3"]).shape == (1, 6, 12)
    cross_attention = [m for name, m in model.network.named_modules() if name.endswith("attn2.to_k")]
    assert cross_attention
    assert {m.in_features for m in cross_attention} == {12}
    assert model.network.conv_in.in_channels == model.network.conv_out.out_channels == channels


def test_what_the_config_says_reaches_the_parts(config):
    model = build_model(
        config("diffusion.prediction=eps", "diffusion.schedule.kind=betas", "model.channels_last=false")
    )
    assert model.prediction == "eps"
    assert type(model.schedule).__name__ == "BetaSchedule"
    weight = model.network.conv_in.weight
    assert weight.is_contiguous()
    assert build_schedule(config("diffusion.schedule.logsnr_max=8")).logsnr(torch.zeros(())).item() == pytest.approx(8)


@pytest.mark.parametrize(
    ("override", "build_part", "message"),
    [
        ("model.network.norm_groups=5", build_model, "model.network: norm_groups=5"),
        ("model.text_encoder.heads=3", build_model, "model.text_encoder: "),
        ("diffusion.schedule.logsnr_min=30", build_model, "diffusion.schedule: logsnr_min=30"),
        ("data.image_size=4", build_data, "data: image_size=4 must be at least 8"),
        ("sampling.steps=0", lambda c: build_sampling(c, build_schedule(c)), "sampling.times: sampling steps=0"),
    ],
)
def test_a_constructors_complaint_names_the_section(config, override, build_part, message):
    with pytest.raises(ConfigError) as error:
        build_part(config(override))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", ["image/digits", "image/digits_inverted"])
def test_the_image_shape_is_known_before_the_data_is_loaded(config, kind):
    tiny = config(f"data.kind={kind}", "data.image_size=11")
    data = build_data(tiny)
    assert data.name == kind
    assert data.inverted == kind.endswith("_inverted")
    assert tuple(data.train.images.shape[1:]) == image_shape(tiny) == (1, 11, 11)


# --- sampling ---


class Towards:
    """A denoiser that knows the data: one image."""

    def __init__(self, schedule, x0):
        self.schedule, self.x0 = schedule, x0

    def __call__(self, xt, t):
        return self.x0.expand_as(xt)


def test_sampling_is_what_the_section_says(config, generator):
    tiny = config(
        "sampling.cfg_scale=3", "sampling.clip_x0=false", "sampling.sampler.eta=0.7", "sampling.times.kind=logsnr",
        "sampling.times.logsnr_max=6",
    )  # fmt: skip
    schedule = build_schedule(tiny)
    sampling = build_sampling(tiny, schedule)
    assert (sampling["cfg_scale"], sampling["clip_x0"]) == (3.0, False)
    assert torch.equal(sampling["times"], logsnr_times(schedule, 3, logsnr_max=6.0))
    denoiser, noise = Towards(schedule, torch.full((1, 1, 1), 0.5)), torch.randn(2, 1, 4, 4, generator=generator)
    drawn = [
        sampler(denoiser, noise, sampling["times"], generator=torch.Generator().manual_seed(1), **eta)
        for sampler, eta in [(sampling["sampler"], {}), (sample_ddim, {"eta": 0.7}), (sample_ddim, {"eta": 0.0})]
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("sampler", build.SAMPLERS)
@pytest.mark.parametrize("times", build.TIME_GRIDS)
def test_every_sampler_reaches_known_data_on_every_grid(config, sampler, times, generator):
    tiny = config(f"sampling.sampler.kind={sampler}", f"sampling.times.kind={times}", "sampling.steps=6")
    schedule = build_schedule(tiny)
    sampling = build_sampling(tiny, schedule)
    x0 = torch.rand(1, 4, 4, generator=generator)
    noise = torch.randn(2, 1, 4, 4, generator=generator)
    drawn = sampling["sampler"](Towards(schedule, x0), noise, sampling["times"], generator=generator)
    torch.testing.assert_close(drawn, x0.expand_as(drawn), atol=0.02, rtol=0)


# --- checkpoints ---


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
        ("data.image_size=16", "is for images (1, 8, 8), the config for (1, 16, 16)"),
        ("data.kind=image/cifar10", "is for images (1, 8, 8), the config for (3, 8, 8)"),
    ],
)
def test_another_architecture_is_refused_with_the_key_that_differs(saved, config, tmp_path, override, difference):
    _, path = saved
    with pytest.raises(CheckpointError) as error:
        check_same_architecture(config(override), load_model_file(path))
    assert str(path) in str(error.value)
    assert difference in str(error.value)

    other = tmp_path / "other.yaml"
    other.write_text(OmegaConf.to_yaml(config(override)))
    with pytest.raises(CheckpointError, match=r"diffusion-7\.safetensors is "):
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


def test_weights_that_do_not_fit_their_own_config_are_refused(saved, config, tmp_path):
    model, path = saved
    tensors = dict(model.state_dict())
    removed = tensors.pop("network.conv_in.weight")
    header = {"config": OmegaConf.to_container(config()), "image_shape": (1, 8, 8), "step": 1}
    save_model(path, tensors, **header)
    with pytest.raises(CheckpointError, match=r"another architecture: .*network\.conv_in\.weight"):
        load_model(path)
    save_model(path, tensors | {"network.conv_in.weight": removed[:4]}, **header)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_model(path)


def test_a_config_inside_a_checkpoint_is_checked_like_any_other(saved, config):
    model, path = saved
    theirs = OmegaConf.to_container(config())
    theirs["model"]["network"]["chanels"] = theirs["model"]["network"].pop("channels")
    save_model(path, model.state_dict(), config=theirs, image_shape=(1, 8, 8), step=7)
    with pytest.raises(ConfigError, match=r"diffusion-7\.safetensors: .*did you mean channels\?"):
        load_model(path)
