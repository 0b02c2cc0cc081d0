"""The config by which a model draws as its LoRAs were trained, or as its base does before a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from xdiffusion.build import SCHEMA, resolved
from xdiffusion.checkpoints.drawing_settings import DRAWN_BY, PROCESS, value_at
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_formats.native import trained_config
from xdiffusion.checkpoints.native import ModelFile
from xdiffusion.config import with_overrides
from xdiffusion.config_files import check_values, merge, nested
from xdiffusion.loading import config_differences, own_config, to_stderr


def as_trained(config: DictConfig, loras: Sequence[Path], tell: Callable[[str], None] = to_stderr) -> DictConfig:
    """A model's config that draws as its LoRAs were trained, see `DRAWN_BY`.

    Args:
        config: of the model.
        loras: files; those that say nothing of their training change nothing.
        tell: is called with a line for each value that changes.

    Raises:
        CheckpointError: if they were trained for different predictions or schedules, or a file is damaged.
        ConfigError: if what a file says cannot be.
    """
    said = {path: trained_config(path) for path in loras}
    trained = {path: _drawn_as(config, content, path, DRAWN_BY) for path, content in said.items() if content}
    chosen = config
    for path, one in trained.items():
        is_first = chosen is config
        for key, ours, theirs in config_differences(chosen, one, DRAWN_BY):
            if not is_first:
                raise CheckpointError(
                    f"these LoRAs cannot be drawn together: {path} was trained with {key}={theirs}, another with {ours}"
                )
            tell(f"{path} was trained with {key}={theirs}, and is drawn so but for flags; its base has {ours}")
        chosen = one
    return chosen


def drawn_as_base(config: DictConfig, base: ModelFile | None) -> DictConfig:
    """A run's config with the prediction and the schedule by which its base draws before the run has changed it.

    They are the run's own where there is no base, or its file does not say.

    Raises:
        CheckpointError, ConfigError: if what the file says is wrong.
    """
    stored = own_config(base) if base is not None else None
    if stored is None:
        return config
    guessed = base.stable_diffusion.guessed if base.stable_diffusion else ""
    return _drawn_as(config, OmegaConf.to_container(stored), base.path, [key for key in PROCESS if key != guessed])


def _drawn_as(config: DictConfig, content: Mapping[str, Any], path: Path, keys: Sequence[str]) -> DictConfig:
    """A config with those of these keys of another's that both have."""
    check_values(content, str(path))
    keys = [key for key in keys if value_at(config, key) is not None and value_at(content, key) is not None]
    chosen = merge(str(path), *(nested(key, value_at(content, key)) for key in keys))
    return resolved(with_overrides(config, chosen, SCHEMA), str(path))
