"""Names in a config become the objects they promise, and checkpoints only meet configs of their own architecture."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import copies, tiny_config, tiny_trainer

from xdiffusion import build
from xdiffusion.build import (
    SCHEMA,
    build_data,
    build_model,
    build_sampling,
    build_schedule,
    image_shape,
    load_config,
    override,
)
from xdiffusion.config import Section, Slot
from xdiffusion.config_files import ConfigError
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
            injected = getattr(section, "injected", frozenset()) - {"seed"}  # of image/shards alone
            assert injected <= set(signature(target)), target


def test_every_data_set_has_channels_and_captions():
    their_own = {"image/folder", "image/hugging_face", "image/shards"}  # captions that come with the pictures
    assert set(build.DATASETS) == set(build.IMAGE_CHANNELS) == set(PROMPT_TABLES) | their_own


# --- models ---


@pytest.mark.parametrize(("kind", "channels"), [("image/digits", 1), ("image/cifar10", 3), ("image/cifar10_inverted", 3)])
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
    model = build_model(config("diffusion.prediction=eps", "diffusion.schedule.kind=betas", "model.channels_last=false"))
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
    assert (sampling["settings"].cfg_scale, sampling["settings"].clip_x0) == (3.0, False)
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
    table = ["diffusion.schedule.kind=betas"] if times == "timesteps" else []
    tiny = config(f"sampling.sampler.kind={sampler}", f"sampling.times.kind={times}", "sampling.steps=6", *table)
    schedule = build_schedule(tiny)
    sampling = build_sampling(tiny, schedule)
    x0 = torch.rand(1, 4, 4, generator=generator)
    noise = torch.randn(2, 1, 4, 4, generator=generator)
    drawn = sampling["sampler"](Towards(schedule, x0), noise, sampling["times"], generator=generator)
    torch.testing.assert_close(drawn, x0.expand_as(drawn), atol=0.02, rtol=0)


def test_a_model_without_weights_has_the_names_and_shapes_and_a_real_schedule(config):
    table = config("diffusion.schedule.kind=betas")
    empty, model = build_model(table, without_weights=True), build_model(table)
    assert all(p.is_meta for p in empty.parameters())
    shapes = [{n: (p.shape, p.stride(), p.dtype) for n, p in m.state_dict().items()} for m in (empty, model)]
    assert shapes[0] == shapes[1]
    assert torch.equal(empty.schedule.alpha_bar, model.schedule.alpha_bar)


# --- a network of someone else's ---


def test_a_network_needs_no_more_than_the_contract_s_call(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    monkeypatch.setitem(build.NETWORKS, "plain", "tests.tiny:PlainNetwork")
    config = tiny_config("model.network.kind=plain", "model.network.width=8")
    trainer = tiny_trainer(config)
    assert trainer.task.model.network.conv_in.out_channels == 8
    before = copies(trainer.task.model.network.state_dict())
    trainer.step(1)
    after = trainer.task.model.network.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before)
    model = trainer.task.model.eval()
    assert generate(model, ["0"], generators_for(0, 1), **build_sampling(config, model.schedule)).shape == (1, 1, 12, 12)

    for word, message in (
        ("gradient_checkpointing", "training.gradient_checkpointing=true: a plain has no such switch"),
        ("shard_weights", r"training.shard_weights=true: a PlainNetwork does not name its blocks\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(override(config, [f"training.{word}=true"], "test"))
    with pytest.raises(ConfigError, match=r"model\.network\.channels is unknown"):
        tiny_config("model.network.kind=plain", "model.network.channels=[8]")
