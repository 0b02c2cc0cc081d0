"""The only place where a name in a config becomes an object: one literal dict per slot, and the constructors' calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from xdiffusion.config import Overlay, Section, Slot, as_it_holds, as_written, laid_over, resolve, with_home, with_overrides
from xdiffusion.config_files import ConfigError, load_yaml, merge, parse_overrides
from xdiffusion.places import PATHS
from xdiffusion.signatures import Parameter, signature

if TYPE_CHECKING:
    from xdiffusion.data.captioned_images import CaptionedImages
    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.data.shards import Shards
    from xdiffusion.diffusion.schedules import Schedule
    from xdiffusion.model import DiffusionModel
    from xdiffusion.text_encoders.clip import CLIPTextEncoder

DATASETS = {
    "image/digits": "xdiffusion.data.digits:load_digits",
    "image/mnist": "xdiffusion.data.torchvision_sets:load_mnist",
    "image/fashion_mnist": "xdiffusion.data.torchvision_sets:load_fashion_mnist",
    "image/cifar10": "xdiffusion.data.torchvision_sets:load_cifar10",
    "image/folder": "xdiffusion.data.image_folder:load_image_folder",
    "image/hugging_face": "xdiffusion.data.hugging_face:load_hugging_face",
    "image/shards": "xdiffusion.data.shards:load_shards",
}
IMAGE_CHANNELS = {"image/digits": 1, "image/mnist": 1, "image/fashion_mnist": 1, "image/cifar10": 3}
IMAGE_CHANNELS |= {"image/folder": 3, "image/hugging_face": 3, "image/shards": 3}
NETWORKS = {"unet": "xdiffusion.networks.unet:UNet"}
TEXT_ENCODERS = {
    "clip": "xdiffusion.text_encoders.clip:CLIPTextEncoder",
    "open_clip": "xdiffusion.text_encoders.open_clip:open_clip_text_encoder",
}
AUTOENCODERS = {
    "identity": "xdiffusion.autoencoders.identity:IdentityAutoencoder",
    "kl": "xdiffusion.autoencoders.kl:KLAutoencoder",
}
SCHEDULES = {
    "cosine": "xdiffusion.diffusion.schedules:CosineSchedule",
    "betas": "xdiffusion.diffusion.schedules:BetaSchedule",
}
SAMPLERS = {
    "ancestral": "xdiffusion.samplers.ancestral:sample_ancestral",
    "ddim": "xdiffusion.samplers.ddim:sample_ddim",
    "heun": "xdiffusion.samplers.heun:sample_heun",
    "dpm_solver": "xdiffusion.samplers.dpm_solver:sample_dpm_solver",
    "euler": "xdiffusion.samplers.euler:sample_euler",
    "euler_ancestral": "xdiffusion.samplers.euler:sample_euler_ancestral",
}
TIME_GRIDS = {
    "uniform": "xdiffusion.samplers.time_grids:uniform_times",
    "logsnr": "xdiffusion.samplers.time_grids:logsnr_times",
    "karras": "xdiffusion.samplers.time_grids:karras_times",
    "timesteps": "xdiffusion.samplers.time_grids:timestep_times",
}
INVERTED = "_inverted"
WITH_CLASSES = ("image/digits", "image/mnist", "image/fashion_mnist", "image/cifar10")
MAX_PARAMETERS = 3_000  # weight tensors of a model that is read from a file; Stable Diffusion has 1,200
MAX_SIDE = 8192  # pixels of an image
_PRETRAINED = Parameter("pretrained", ast.parse("str | None", mode="eval").body, "tiny")
_LEARNING_RATE = Parameter("learning_rate", ast.parse("float | None", mode="eval").body, None)
_SAMPLER_ARGUMENTS = frozenset({"denoiser", "x_T", "times", "generator", "on_step"})

SCHEMA = {
    "data": Slot(DATASETS, injected=frozenset({"seed"}), suffix=INVERTED, with_suffix=WITH_CLASSES),
    "model": Section(
        "xdiffusion.model:DiffusionModel",
        injected=frozenset({"network", "text_encoder", "autoencoder", "schedule", "prediction", "image_shape"}),
        children={
            "network": Slot(NETWORKS, injected=frozenset({"in_channels", "context_dim"}), default="unet"),
            "text_encoder": Slot(TEXT_ENCODERS, extra={"pretrained": _PRETRAINED}, default="clip"),
            "autoencoder": Slot(AUTOENCODERS, injected=frozenset({"channels"}), default="identity"),
        },
    ),
    "diffusion": Section(
        "xdiffusion.diffusion.objective:loss",
        injected=frozenset({"network", "schedule", "x0", "context", "generator", "share", "weights"}),
        children={"schedule": Slot(SCHEDULES, default="cosine")},
    ),
    "clip": Section(children={"training": Overlay("training"), "optimizer": Overlay("optimizer")}),
    "training": Section("xdiffusion.training.settings:TrainingSettings"),
    "optimizer": Section("xdiffusion.training.settings:OptimizerSettings"),
    "checkpoints": Section("xdiffusion.training.settings:CheckpointSettings"),
    "cache": Section("xdiffusion.training.settings:CacheSettings"),
    "sampling": Section(
        "xdiffusion.model:SamplingSettings",
        children={
            "sampler": Slot(SAMPLERS, injected=_SAMPLER_ARGUMENTS, default="ddim"),
            "times": Slot(TIME_GRIDS, injected=frozenset({"schedule", "steps"}), default="uniform"),
        },
    ),
    "lora": Section(
        "xdiffusion.lora.inject:apply_lora_to_model",
        injected=frozenset({"model", "adapter_name"}),
        children={name: Overlay(name) for name in ("training", "optimizer", "cache")},
    ),
    "text_encoder_lora": Section(
        "xdiffusion.lora.inject:apply_lora_to_model",
        injected=frozenset({"model", "adapter_name"}),
        extra={"learning_rate": _LEARNING_RATE},
        optional=True,
    ),
    "prior": Section("xdiffusion.training.settings:PriorSettings", optional=True),
    "textual_inversion": Section("xdiffusion.training.settings:TextualInversionSettings", optional=True),
}


def load_config(path: str | Path, overrides: Sequence[str] = (), use_lora_training: bool = False) -> DictConfig:
    """A checked config from a YAML file and `KEY=VALUE` overrides.

    Args:
        path: the YAML file.
        overrides: applied last, in order.
        use_lora_training: lay `lora.training`, `lora.optimizer` and `lora.cache` over the sections of these names first; what
            then beats them stands there too, so that the config, written and read again so, is the same.

    Raises:
        ConfigError: for any key or value that the schema does not allow.
    """
    config = written_config(path)
    if use_lora_training:
        of_lora = parse_overrides([o for o in overrides if o.startswith("lora.")])
        config = with_overrides(config, of_lora, SCHEMA)
        if not isinstance(config.get("lora"), dict):
            raise ConfigError(f"{path} has no section lora:, which --use_lora_training reads")
        resolved(config, str(path))  # so that a mistake in what is laid over others is said of its own place
        config = merge(str(path), config, laid_over(config, "lora", SCHEMA))
    chosen = override(config, overrides, str(path))
    return resolved(as_it_holds(chosen, "lora", SCHEMA), str(path)) if use_lora_training else chosen


def written_config(path: str | Path) -> dict[str, Any]:
    """What a YAML file and those below it say, unchecked; a kind that one changes takes the old one's own keys away."""
    return load_yaml(path, lambda source, below, above: with_overrides(below, above, SCHEMA, source))


def clip_config(config: DictConfig) -> DictConfig:
    """The config of the run that trains the tiny CLIP: `clip.training` over the section itself, `clip.optimizer` alone.

    It is another text encoder for another CLIP: how a run's batches are cut and what optimizes it does not change it.
    """
    written = as_written(config) | {"optimizer": {}}
    del written["training"]["gradient_accumulation_steps"]
    return resolved(merge("clip:", written, laid_over(written, "clip", SCHEMA)), "clip:")


def override(config: Mapping[str, Any], overrides: Sequence[str], source: str) -> DictConfig:
    """`KEY=VALUE` overrides on top of a config, checked; `source` is named in errors."""
    return resolved(with_overrides(config, parse_overrides(overrides), SCHEMA), source)


def resolved(config: Mapping[str, Any], source: str) -> DictConfig:
    """`resolve` by the schema, and what takes two keys to see; `source` is named in errors.

    Raises:
        ConfigError: see `resolve`; and for predicting eps at a time without signal ([ZTSNR] section 3.2).
    """
    whole = resolve(with_home(config, PATHS), SCHEMA, source)
    if whole.diffusion.prediction == "eps" and whole.diffusion.schedule.get("zero_terminal_snr"):
        raise ConfigError(
            f"{source}: diffusion.prediction=eps with diffusion.schedule.zero_terminal_snr=true: at t = 1 nothing but noise "
            "is left, and from its noise no image can be told; such a model predicts v (or x0)"
        )
    return whole


def build_data(config: DictConfig) -> ImageSet | CaptionedImages | Shards:
    """The images of `data:`; a kind with the suffix `_inverted` is the inverted style of the set before it.

    Raises:
        ConfigError: if they are not there.
    """
    from xdiffusion.data.image_set import invert

    kind = config.data.kind
    target = DATASETS[kind.removesuffix(INVERTED)]
    seed = {"seed": config.training.seed} if "seed" in signature(target) else {}
    images = _construct(target, config.data, "data", **seed)
    return invert(images) if kind.endswith(INVERTED) else images


def image_shape(config: DictConfig) -> tuple[int, int, int]:
    """(C, H, W) of the images of `data:`, known without loading them.

    Raises:
        ConfigError: if they have a side that no image has.
    """
    if not 1 <= config.data.image_size <= MAX_SIDE:
        raise ConfigError(f"data.image_size={config.data.image_size} must be from 1 to {MAX_SIDE:,}")
    channels = IMAGE_CHANNELS[config.data.kind.removesuffix(INVERTED)]
    return channels, config.data.image_size, config.data.image_size


def build_model(config: DictConfig, *, without_weights: bool = False) -> DiffusionModel:
    """The model of `model:` and `diffusion:`; sizes shared by two parts are read off the built one.

    Args:
        config: resolved.
        without_weights: on the meta device, for `loading.load_weights` to fill; otherwise with fresh weights.
    """
    schedule = build_schedule(config)
    with _without_weights() if without_weights else nullcontext():
        return _build_model(config, schedule)


def _build_model(config: DictConfig, schedule: Schedule) -> DiffusionModel:
    from xdiffusion.model import DiffusionModel

    parts = config.model
    shape = image_shape(config)
    text_encoder = build_text_encoder(config)
    autoencoder = _construct(AUTOENCODERS[parts.autoencoder.kind], parts.autoencoder, "model.autoencoder", channels=shape[0])
    network = _construct(
        NETWORKS[parts.network.kind],
        parts.network,
        "model.network",
        in_channels=autoencoder.latent_channels,
        context_dim=text_encoder.width,
    )
    given = parts.network.get("out_channels")
    if given not in (None, autoencoder.latent_channels):
        raise ConfigError(
            f"model.network.out_channels={given} must be null or {autoencoder.latent_channels}, as many as what is denoised has"
        )
    with _at_section("model.network"):
        return DiffusionModel(
            network, text_encoder, autoencoder, schedule, config.diffusion.prediction, shape, parts.channels_last
        )


def build_text_encoder(config: DictConfig) -> CLIPTextEncoder:
    """The text encoder of `model.text_encoder:` with random weights."""
    slot = config.model.text_encoder
    return _construct(TEXT_ENCODERS[slot.kind], slot, "model.text_encoder")


def build_fresh_text_encoder(config: DictConfig) -> CLIPTextEncoder:
    """As `build_text_encoder`, with the random weights of the run's seed, whatever was drawn before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return build_text_encoder(config)


def build_schedule(config: DictConfig) -> Schedule:
    """The noise schedule of `diffusion.schedule:`."""
    slot = config.diffusion.schedule
    return _construct(SCHEDULES[slot.kind], slot, "diffusion.schedule")


def set_process(model: DiffusionModel, config: DictConfig) -> None:
    """Let a finished model draw as a config says: on its schedule, read by its prediction, with its clip_skip."""
    model.schedule, model.prediction = build_schedule(config), config.diffusion.prediction
    if "clip_skip" in config.model.text_encoder:
        model.text_encoder.clip_skip = config.model.text_encoder.clip_skip


def build_sampling(config: DictConfig, schedule: Schedule) -> dict[str, Any]:
    """The keyword arguments of `model.generate` that `sampling:` decides: sampler, times and settings."""
    from torch.nn import Identity

    from xdiffusion.diffusion.denoiser import Denoiser
    from xdiffusion.model import SamplingSettings

    sampling = config.sampling
    sampler = partial(_target(SAMPLERS[sampling.sampler.kind]), **_keywords(sampling.sampler))
    grid = _target(TIME_GRIDS[sampling.times.kind])
    with _at_section("sampling.times"):
        times = grid(schedule, sampling.steps, **_keywords(sampling.times))
    with _at_section("sampling.sampler"):
        denoiser = Denoiser(Identity(), schedule, config.diffusion.prediction)
        sampler(denoiser, times.new_empty(0, 1, 1, 1), times[:1])  # it takes no step, and looks at its arguments
    with _at_section("sampling"):
        settings = SamplingSettings(**{k: v for k, v in _keywords(sampling).items() if k not in ("sampler", "times")})
    return {"sampler": sampler, "times": times, "settings": settings}


def _construct(target: str, slot: DictConfig, where: str, **injected: Any) -> Any:
    with _at_section(where):
        return _target(target)(**_keywords(slot), **injected)


def _target(target: str) -> Any:
    module_name, name = target.split(":")
    return getattr(import_module(module_name), name)


def _keywords(slot: DictConfig) -> dict[str, Any]:
    plain: Mapping[str, Any] = OmegaConf.to_container(slot)
    return {k: v for k, v in plain.items() if k not in ("kind", "pretrained")}


@contextmanager
def _without_weights() -> Iterator[None]:
    """Modules made in this block are on the meta device, and torch.nn.init does nothing: on meta it takes seconds too.

    The config may be that of a stranger's checkpoint, which can ask for layers without end: they are counted.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.overrides import TorchFunctionMode

    class SkipInit(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    made = count(1)

    def count_parameter(*_: Any) -> None:
        if next(made) > MAX_PARAMETERS:
            raise ConfigError(f"it describes a model of more than {MAX_PARAMETERS:,} weight tensors")

    counting = register_module_parameter_registration_hook(count_parameter)
    try:
        with torch.device("meta"), SkipInit():
            yield
    except (RuntimeError, TypeError, OverflowError, ZeroDivisionError) as error:  # widths that no tensor can have
        raise ConfigError(f"the sizes of its model cannot be: {shorten(str(error), 100, placeholder='...')}") from error
    finally:
        counting.remove()


@contextmanager
def _at_section(where: str) -> Iterator[None]:
    """A constructor's complaint about its arguments is a mistake in the config's section `where`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
