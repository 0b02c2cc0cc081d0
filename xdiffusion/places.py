"""Where the commands put what they make, unless a flag or a config says otherwise, and what they say of a place without it."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

OUTPUT_ROOT = Path("output")
JUDGE_FOLDER = OUTPUT_ROOT / "judge"
PATHS = ("data.data_dir", "cache.folder", "prior.data_dir", "model.text_encoder.pretrained")  # keys of a config
CACHE_FOLDER = "output/cache"  # a literal: the schema of configs reads it from this source


def sample_folder(dataset: str, checkpoint: Path, config_path: str | None, *, ours: bool) -> Path:
    """Where a checkpoint's samples go.

    In the folder of its run that is named by the config; other files lie beside each other, and have names of their own.

    Args:
        ours: it is of a run of this project; else no name makes it one.
    """
    path = Path(os.path.abspath(checkpoint))  # noqa: PTH100  absolute() keeps `..`, which would be a name
    in_run = (path.parent / "run.json").is_file() or re.fullmatch(r"diffusion-[0-9]+", path.stem)
    if ours and in_run:
        name = Path(config_path).stem if config_path else path.parent.name
    else:
        name = path.name if path.is_dir() else path.stem
    return OUTPUT_ROOT / dataset / "sample" / name


def nothing_at(path: Path, what: str, suffixes: Sequence[str]) -> str:
    """Why a path is not the file that is looked for, and which of these suffixes, up to five, may have been meant."""
    is_folder, place = path.is_dir(), path if path.is_dir() else path.parent
    there = [p.name for p in place.glob("*") if p.suffix in suffixes and p.is_file()] if place.is_dir() else []
    there.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    if is_folder:
        return f"{path} is a folder, not a {what}; " + (f"it holds: {', '.join(there[-5:])}" if there else "it holds none")
    stems = {name: Path(name).stem for name in there}
    near = difflib.get_close_matches(path.stem, stems.values(), n=5, cutoff=0.5)  # by whole names all of one ending are near
    found = f"; there are: {', '.join(name for name, stem in stems.items() if stem in near)}" if near else ""
    return f"no {what} at {path}{found}{looked_for_in(path)}"


def looked_for_in(path: Path) -> str:
    """What a message on a path that is not there adds: where it was looked for, if the path does not say so itself."""
    return "" if path.is_absolute() else f" (in the working folder {Path.cwd()})"
