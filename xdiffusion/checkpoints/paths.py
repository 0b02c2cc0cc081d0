"""Which file or folder stands for a path that was named, and which may not be written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.places import nothing_at

SAFETENSORS = ".safetensors"
STATE = ".state.pt"  # of a run, beside its weights
PICKLED = (".pt", ".ckpt", ".bin", ".pth")


def existing_weights(path: Path, what: str = "checkpoint") -> tuple[Path, str | None]:
    """The file (of peft and diffusers, the folder) that stands for `path`, and a line to print if it is another one.

    Lessons and older commands name `diffusion-10000.pt` where this project writes `diffusion-10000.safetensors`.

    Raises:
        CheckpointError: if neither exists, calling it `what`, of which up to five there of a similar name are listed; for a
            run's state, naming the weights beside it.
    """
    if path.name.endswith(STATE) and (weights := path.with_name(path.name.removesuffix(STATE) + SAFETENSORS)).is_file():
        raise CheckpointError(f"{path} is the state of a run, not a {what}: name {weights.name}, whose state this is")
    if path.is_file() or is_adapter_folder(path) or is_pipeline_folder(path):
        return path, None
    if path.suffix in PICKLED and path.with_suffix(SAFETENSORS).is_file():
        twin = path.with_suffix(SAFETENSORS)
        return twin, f"{path} is not there; reading {twin.name} beside it"
    on_hub = "; of a name on the hub nothing is fetched: download it, and name the file or folder"
    named_so = len(path.parts) == 2 and not path.suffix and not path.parent.exists()
    raise CheckpointError(nothing_at(path, what, [SAFETENSORS]) + on_hub * named_so)


def weights_file(path: str | Path, what: str = "checkpoint") -> Path:
    """`existing_weights` for a command line: the line about another name goes to stderr.

    Raises:
        CheckpointError: if there is none.
    """
    found, note = existing_weights(Path(path), what)
    if note:
        print(note, file=sys.stderr)
    return found


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter of peft, or one for each component of a pipeline."""
    return any((folder / "adapter_config.json").is_file() for folder in (path, path / "unet", path / "text_encoder"))


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder holds a diffusers pipeline of a latent diffusion model."""
    return (path / "unet" / "config.json").is_file() and (path / "vae").is_dir()


def refuse_leftover(path: Path) -> None:
    """Complain of a file of another LoRA where it would be read as a part of what is to be written.

    Raises:
        CheckpointError: if it is there.
    """
    if path.exists():
        raise CheckpointError(f"{path} of another LoRA would be read with what is to be written: move it away")


def refuse_overwriting(read: Sequence[Path], output: Path) -> None:
    """Complain of an output that is one of the files or folders that are read for it.

    Raises:
        CheckpointError: if it is one.
    """
    for path in read:
        there = path if path.exists() else path.with_suffix(SAFETENSORS)  # which is read in its place
        if there.exists() and output.exists() and there.samefile(output):
            raise CheckpointError(f"{output} would be overwritten, and is read: name another output")
