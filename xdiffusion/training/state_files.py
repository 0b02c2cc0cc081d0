"""The state beside a weights file: its name, its hashes, what stands there until it is written, and the names of what a run
begun anew sets aside."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import file_hash, state_hash
from xdiffusion.checkpoints.paths import STATE
from xdiffusion.checkpoints.reading import load_pickled
from xdiffusion.checkpoints.writing import save_pickled


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state that belongs to the weights file at `path`, with both hashes."""
    state = state | {"weights_hash": file_hash(path)}
    state["hash"] = state_hash(state)
    save_pickled(state_path(path), state)


def whole_state(path: Path) -> dict[str, Any]:
    """The state beside a weights file, both seen to be as they were written.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    beside = state_path(path)
    aside = aside_path(path)
    if aside.is_file() and not beside.is_file():
        raise CheckpointError(
            f"no file at {beside}: a run begun anew has set it aside; rename {aside.name} to {beside.name} to go on from it"
        )
    state = load_pickled(beside)
    if not isinstance(state, dict) or state.pop("hash", None) != state_hash(state):
        raise CheckpointError(f"{beside} is damaged: its content does not have the hash that it carries")
    if file_hash(path) != state.get("weights_hash"):
        raise CheckpointError(f"{path} is damaged: it is not the file that {beside.name} was written for")
    return state


def state_path(weights: Path) -> Path:
    """diffusion-N.safetensors -> diffusion-N.state.pt."""
    return weights.with_suffix(STATE)


def saving_path(weights: Path) -> Path:
    """What stands beside weights until they have their state: what it is left beside, a kill or a full disk cut short."""
    return weights.with_suffix(".saving")


def aside_path(weights: Path) -> Path:
    """Where `RunCheckpoints.set_aside` puts the state beside a weights file."""
    return _earlier(state_path(weights))


def free_aside(path: Path) -> Path:
    """A name for what is no state: diffusion-N.safetensors.earlier, or ....earlier-2 and so on where others have been."""
    names = (_earlier(path, f"-{number}" if number > 1 else "") for number in count(1))
    return next(name for name in names if not name.exists())


def _earlier(path: Path, number: str = "") -> Path:
    return path.with_name(f"{path.name}.earlier{number}")
