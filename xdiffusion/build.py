"""The only place where a name in a config becomes an object: one literal dict per slot, and the constructors' calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from xdiffusion.config import (
    ConfigError,
    Overlay,
    Section,
    Slot,
    load_yaml,
    merge,
    parse_overrides,
    resolve,
    with_overrides,
)
from xdiffusion.signatures import Parameter

if TYPE_CHECKING:
    from xdiffusion.checkpoints.native import ModelFile
    from xdiffusion.data.image_set import ImageSet
    from xdiffusion.diffusion.schedules import Schedule
    from xdiffusion.model import DiffusionModel
    from xdiffusion.text_encoders.clip import CLIPTextEncoder

DATASETS = {
    "image/digits": "xdiffusion.data.digits:load_digits",
    "image/mnist": "xdiffusion.data.torchvision_sets:load_mnist",
    "image/fashion_mnist": "xdiffusion.data.torchvision_sets:load_fashion_mnist",
    "image/cifar10": "xdiffusion.data.torchvision_sets:load_cifar10",
}
IMAGE_CHANNELS = {"image/digits": 1, "image/mnist": 1, "image/fashion_mnist": 1, "image/cifar10": 3}
NETWORKS = {"unet": "xdiffusion.networks.unet:UNet"}
TEXT_ENCODERS = {
    "clip": "xdiffusion.text_encoders.clip:CLIPTextEncoder",
    "open_clip": "xdiffusion.text_encoders.open_clip:open_clip_text_encoder",
}
AUTOENCODERS = {"identity": "xdiffusion.autoencoders.identity:IdentityAutoencoder"}
SCHEDULES = {
    "cosine": "xdiffusion.diffusion.schedules:CosineSchedule",
    "betas": "xdiffusion.diffusion.schedules:BetaSchedule",
}
SAMPLERS = {
    "ancestral": "xdiffusion.samplers.ancestral:sample_ancestral",
    "ddim": "xdiffusion.samplers.ddim:sample_ddim",
    "heun": "xdiffusion.samplers.heun:sample_heun",
    "dpm_solver": "xdiffusion.samplers.dpm_solver:sample_dpm_solver",
}
TIME_GRIDS = {
    "uniform": "xdiffusion.samplers.time_grids:uniform_times",
    "logsnr": "xdiffusion.samplers.time_grids:logsnr_times",
    "karras": "xdiffusion.samplers.time_grids:karras_times",
}
INVERTED = "_inverted"
_PRETRAINED = Parameter("pretrained", ast.parse("str | None", mode="eval").body, "tiny")
_LEARNING_RATE = Parameter("learning_rate", ast.parse("float | None", mode="eval").body, None)
_SAMPLER_ARGUMENTS = frozenset({"denoiser", "x_T", "times", "generator", "on_step"})

SCHEMA = {
    "data": Slot(DATASETS, suffix=INVERTED),
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
        injected=frozenset({"network", "schedule", "x0", "context", "generator", "share"}),
        children={"schedule": Slot(SCHEDULES, default="cosine")},
    ),
    "clip": Section(
        "xdiffusion.training.contrastive:train_contrastive", injected=frozenset({"model", "data", "seed", "on_step"})
    ),
    "training": Section("xdiffusion.training.settings:TrainingSettings"),
    "optimizer": Section("xdiffusion.training.settings:OptimizerSettings"),
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
        children={"training": Overlay("training"), "optimizer": Overlay("optimizer")},
    ),
    "text_encoder_lora": Section(
        "xdiffusion.lora.inject:apply_lora_to_model",
        injected=frozenset({"model", "adapter_name"}),
        extra={"learning_rate": _LEARNING_RATE},
        optional=True,
    ),
}


def load_config(path: str | Path, overrides: Sequence[str] = (), use_lora_training: bool = False) -> DictConfig:
    """A checked config from a YAML file and `KEY=VALUE` overrides.

    Args:
        path: the YAML file.
        overrides: applied last, in order.
        use_lora_training: lay `lora.training` and `lora.optimizer` over `training` and `optimizer` first.

    Raises:
        ConfigError: for any key or value that the schema does not allow.
    """
    config = load_yaml(path)
    if use_lora_training:
        of_lora = parse_overrides([o for o in overrides if o.startswith("lora.")])
        config = with_overrides(config, of_lora, SCHEMA)
        if not isinstance(config.get("lora"), DictConfig):
            raise ConfigError(f"{path} has no section lora:, which --use_lora_training reads")
        overlay = {s: config.lora[s] for s in ("training", "optimizer") if s in config.lora}
        config = merge(str(path), config, overlay)
    return override(config, overrides, str(path))


def override(config: DictConfig, overrides: Sequence[str], source: str) -> DictConfig:
    """`KEY=VALUE` overrides on top of a config, checked; `source` is named in errors."""
    return resolve(with_overrides(config, parse_overrides(overrides), SCHEMA), SCHEMA, source)


def build_data(config: DictConfig) -> ImageSet:
    """The image set of `data:`; a kind with the suffix `_inverted` is the inverted style of the set before it."""
    from xdiffusion.data.image_set import invert

    kind = config.data.kind
    images = _construct(DATASETS[kind.removesuffix(INVERTED)], config.data, "data")
    return invert(images) if kind.endswith(INVERTED) else images


def image_shape(config: DictConfig) -> tuple[int, int, int]:
    """(C, H, W) of the images of `data:`, known without loading them."""
    channels = IMAGE_CHANNELS[config.data.kind.removesuffix(INVERTED)]
    return channels, config.data.image_size, config.data.image_size


def build_model(config: DictConfig) -> DiffusionModel:
    """The model of `model:` and `diffusion:` with fresh weights; sizes shared by two parts are read off the built one."""
    from xdiffusion.model import DiffusionModel

    parts = config.model
    shape = image_shape(config)
    text_encoder = build_text_encoder(config)
    autoencoder = _construct(
        AUTOENCODERS[parts.autoencoder.kind], parts.autoencoder, "model.autoencoder", channels=shape[0]
    )
    network = _construct(
        NETWORKS[parts.network.kind],
        parts.network,
        "model.network",
        in_channels=autoencoder.latent_channels,
        context_dim=text_encoder.width,
    )
    schedule = build_schedule(config)
    with _named("model.network"):
        return DiffusionModel(
            network, text_encoder, autoencoder, schedule, config.diffusion.prediction, shape, parts.channels_last
        )


def build_text_encoder(config: DictConfig) -> CLIPTextEncoder:
    """The text encoder of `model.text_encoder:` with random weights."""
    slot = config.model.text_encoder
    return _construct(TEXT_ENCODERS[slot.kind], slot, "model.text_encoder")


def load_model(path: str | Path, config_path: str | Path | None = None) -> tuple[DiffusionModel, DictConfig]:
    """A trained model in evaluation mode, and its config.

    Args:
        path: a checkpoint of `training/image/train.py`, which carries its config.
        config_path: checked against the checkpoint's config; needed for a file that carries none (`.pt`).

    Raises:
        CheckpointError: if the file is missing, damaged, or of another architecture than the config.
        ConfigError: if there is no config at all, or it is wrong.
    """
    from xdiffusion.checkpoints.native import load_model_file

    file = load_model_file(Path(path))
    if file.config is not None:
        config = resolve(OmegaConf.create(file.config), SCHEMA, str(file.path))
        if config_path is not None:
            check_same_architecture(load_config(config_path), file)
    elif config_path is not None:
        config = load_config(config_path)
    else:
        raise ConfigError(f"{file.path} carries no config: name it with --config_path")
    model = build_model(config)
    load_weights(model, file)
    return model.eval().requires_grad_(False), config


def load_weights(model: DiffusionModel, file: ModelFile) -> None:
    """Put a checkpoint's weights into a model of its architecture.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    from xdiffusion.checkpoints.files import CheckpointError

    try:
        model.load_state_dict(file.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file.path} is a checkpoint for another architecture: {reason}") from error


def check_same_architecture(config: DictConfig, file: ModelFile) -> None:
    """Compare what a config and a checkpoint say of the model, where the checkpoint says anything.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    from xdiffusion.checkpoints.files import CheckpointError

    for key in (
        "model.network",
        "model.text_encoder",
        "model.autoencoder",
        "diffusion.schedule",
        "diffusion.prediction",
    ):
        ours, theirs = (OmegaConf.select(OmegaConf.create(c), key) for c in (config, file.config or config))
        differing = _first_difference(ours, theirs, key)
        if differing:
            raise CheckpointError(f"{file.path} is a checkpoint for another architecture: {differing}")
    if file.image_shape and file.image_shape != image_shape(config):
        raise CheckpointError(f"{file.path} is for images {file.image_shape}, the config for {image_shape(config)}")


def _first_difference(ours: Any, theirs: Any, key: str) -> str:
    if not isinstance(ours, DictConfig):
        return "" if ours == theirs else f"{key}={theirs} there, {ours} in the config"
    keys = (k for k in ours if k != "pretrained")
    return next(filter(None, (_first_difference(ours[k], theirs.get(k), f"{key}.{k}") for k in keys)), "")


def build_schedule(config: DictConfig) -> Schedule:
    """The noise schedule of `diffusion.schedule:`."""
    slot = config.diffusion.schedule
    return _construct(SCHEDULES[slot.kind], slot, "diffusion.schedule")


def build_sampling(config: DictConfig, schedule: Schedule) -> dict[str, Any]:
    """The keyword arguments of `model.generate` that `sampling:` decides: sampler, times, cfg_scale, clip_x0."""
    sampling = config.sampling
    sampler = partial(_target(SAMPLERS[sampling.sampler.kind]), **_keywords(sampling.sampler))
    grid = _target(TIME_GRIDS[sampling.times.kind])
    with _named("sampling.times"):
        times = grid(schedule, sampling.steps, **_keywords(sampling.times))
    return {"sampler": sampler, "times": times, "cfg_scale": sampling.cfg_scale, "clip_x0": sampling.clip_x0}


def _construct(target: str, slot: DictConfig, where: str, **injected: Any) -> Any:
    with _named(where):
        return _target(target)(**_keywords(slot), **injected)


def _target(target: str) -> Any:
    module_name, name = target.split(":")
    return getattr(import_module(module_name), name)


def _keywords(slot: DictConfig) -> dict[str, Any]:
    plain: Mapping[str, Any] = OmegaConf.to_container(slot)
    return {k: v for k, v in plain.items() if k not in ("kind", "pretrained")}


@contextmanager
def _named(where: str) -> Iterator[None]:
    """A constructor's complaint about its arguments is a mistake in the config's section `where`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
