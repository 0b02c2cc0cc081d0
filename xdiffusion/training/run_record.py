"""run.json: what a run was, enough to repeat it and to judge its figures; one segment for each time it was started."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.reading import read_json
from xdiffusion.checkpoints.writing import write_text
from xdiffusion.data.image_set import ImageSet
from xdiffusion.data.shards import Shards
from xdiffusion.places import PATHS

FILE = "run.json"
MAX_BYTES, MAX_DEPTH = 8 * 2**20, 64  # of a run.json; a start takes 1 kB
MAX_NUMBER = 2**53  # up to it a float holds every whole number
SEGMENT = {  # what is read of a start of a run, where it is there
    "status": str,
    "command": list,
    "first_step": int,
    "last_step": int,
    "seconds": int | float,
    "peak_memory_bytes": int,
    "noise": int,
    "device": str,
    "packages": Mapping,
    "git": Mapping | None,
    "changes": list,
}
MACHINERY = ("device", "processes", "threads")  # of a segment: sums round otherwise on another
END_BYTES = 4096
SOURCES = ("xdiffusion", "training", "sampling", "configs")  # an untracked file here may be part of what runs
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "xdiffusion", "torch", "accelerate", "numpy", "safetensors", "omegaconf", "open_clip_torch", "torchvision", "pillow",
    "matplotlib", "bitsandbytes", "datasets",
)  # fmt: skip


class RunRecord:
    """Writes run.json: at the start of a segment with status "running", at its checkpoints, and at its end.

    A segment that a kill cut short keeps its "running", with the figures of its last checkpoint.

    Args:
        folder: of the run; None writes nothing.
        config: resolved.
        command: the words of the command line.
        data, device: trained on.
        processes: that share the batch.
        first_step: of this segment; 1 begins a new record.
        base_hash: of what an adapter is trained on.
        noise: how often the run had gone back, by its checkpoint.
        class_images: trained on beside the data, if any.
        origin: the folder whose run.json this one continues, if it is another one.

    `last_step` is kept up to date by the run; `continues` says whether there is a segment before, `changes`, kept in its
    segment, how a resumed run differs from that, and `status_before` how that ended.
    """

    def __init__(
        self,
        folder: Path | None,
        config: DictConfig,
        command: list[str],
        data: Any,
        device: torch.device,
        processes: int,
        first_step: int,
        base_hash: str | None = None,
        *,
        noise: int = 0,
        class_images: Any = None,
        origin: Path | None = None,
    ):
        self.path = folder / FILE if folder else None
        self.device = device
        self.started = time.perf_counter()
        self.first_step = first_step
        self.last_step = first_step - 1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.segment: dict[str, Any] = {
            "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "first_step": first_step,
            "git": git_state(REPOSITORY),
            "packages": package_versions(),
            "device": device_name(device),
            "processes": processes,
            "threads": torch.get_num_threads(),
            "noise": noise,
            "rollbacks": [],
        }
        self.content = {
            "config": OmegaConf.to_container(config),
            "seeds": {"training": config.training.seed},
            "data": {"name": data.name, "fingerprint": data_fingerprint(data)},
            "base": base_hash,
            "segments": [self.segment],
        }
        if class_images is not None:
            self.content["data"]["class_images"] = data_fingerprint(class_images)
        self.changes: list[str] = []
        self.status_before: str | None = None
        origin = origin or folder
        self.continues = bool(self.path and (origin / FILE).is_file() and first_step > 1)
        if self.continues:
            earlier = _earlier(origin)
            before = earlier["segments"][-1]
            if first_step <= config.training.num_training_steps:
                self.changes = self.segment["changes"] = run_differences(earlier, self.content)
            else:  # no step will be taken under this config
                self.content["config"] = earlier["config"]
            self.status_before = before["status"]
            # its checkpoint may be older than the choice of other noise, which a kill must not undo
            self.segment["noise"] = max(noise, before.get("noise", noise) + (before["status"] == "diverged"))
            self.content["segments"] = [*earlier["segments"], self.segment]
        self._write()

    @property
    def rollbacks(self) -> list[dict[str, int]]:
        """Of this segment, in their order: the step that diverged, and the one of the checkpoint it went back to."""
        return self.segment["rollbacks"]

    @property
    def noise(self) -> int:
        """The number of the noise that is drawn, one more after each divergence of the run; a process without a folder knows
        that of the checkpoint alone."""
        return self.segment["noise"]

    def rolled_back(self, diverged: int, to: int, noise: int) -> None:
        """Record a rollback, and the number of the noise with which the run goes on."""
        self.segment["noise"] = noise
        self.rollbacks.append({"diverged": diverged, "to": to})
        self._write()

    def update(self, status: str = "running") -> None:
        """Write how far the segment has come; at its end status is "finished", "interrupted", "diverged" or "failed"."""
        seconds = time.perf_counter() - self.started
        steps = max(0, self.last_step - self.first_step + 1)  # none where the run went back behind where it began
        self.segment |= {
            "status": status,
            "last_step": self.last_step,
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / seconds, 4),
            "peak_memory_bytes": peak_memory(self.device),
        }
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def _earlier(folder: Path) -> dict[str, Any]:
    """The run.json of a run that goes on.

    Raises:
        CheckpointError: if it is damaged, saying how to go on without it.
    """
    try:
        return read_run(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run goes on without it if {folder / FILE} is moved away") from error


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a run's folder.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"no run in {folder}: it has no {FILE}")
    run = read_json(path, MAX_BYTES)
    try:
        _check(run)
        return run
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error!s:.200}") from error


def _check(run: Any) -> None:
    """See that what is read of a run.json is there, and of its kind.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if not.
    """
    level = [run]
    for _ in range(MAX_DEPTH):
        values = (v.values() if isinstance(v, dict) else v if isinstance(v, list) else () for v in level)
        level = list(chain.from_iterable(values))
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    run["config"].items(), run["segments"][-1]
    _check_kinds(run, {"data": Mapping})
    _check_kinds(run.get("data", {}), {"name": str, "fingerprint": str, "class_images": str})
    for segment in run["segments"]:
        needed = {"seconds": ("first_step", "last_step"), "changes": ("first_step",)}
        _check_kinds(segment, SEGMENT, ("status", *chain.from_iterable(needed[key] for key in needed if key in segment)))
        _check_kinds(segment.get("git") or {}, {"commit": str, "diff": str | None})


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any], needed: Sequence[str] = ()) -> None:
    for key, kind in kinds.items():
        if key in values or key in needed:
            value = values[key]
            if not isinstance(value, kind) or (isinstance(value, int | float) and not abs(value) <= MAX_NUMBER):
                raise TypeError(f"{key}={value!r:.100}")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    pairs = ((f"{prefix}{key}", value) for key, value in config.items())
    leaves = (flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value} for key, value in pairs)
    return {key: value for leaf in leaves for key, value in leaf.items()}


def run_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two runs' config, data, packages, commit and machinery differ, a line for each."""
    last, own = before["segments"][-1], now["segments"][-1]
    lines = []
    for name, a, b in (
        ("", flat(before["config"]), flat(now["config"])),
        ("data.", before.get("data", {}), now["data"]),
        ("", {"base": before.get("base")}, {"base": now.get("base")}),
        ("version of ", last.get("packages", {}), own["packages"]),
        ("git.", last.get("git") or {}, own["git"] or {}),
        ("", *({key: segment.get(key) for key in MACHINERY} for segment in (last, own))),
    ):
        keys = [*a, *(key for key in b if key not in a)]
        lines += [f"{name}{k}={a.get(k)} before, {b.get(k)} now" for k in keys if a.get(k) != b.get(k)]
    return lines


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit, whether tracked files differ from it or sources are not tracked, and a hash of how (None if not).

    None without git, or where the folder is not that of a repository but lies in one: the code is installed there.
    """

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not folder.samefile(os.fsdecode(git("rev-parse", "--show-toplevel"))):
            return None
        changed = git("diff", "HEAD", "--no-ext-diff", "--full-index")
        untracked = git("ls-files", "--others", "--exclude-standard", "-z", "--", *SOURCES)
        commit, diff = git("rev-parse", "HEAD").decode(), hashlib.blake2b(changed + untracked, digest_size=8)
        for name in filter(None, untracked.decode(errors="surrogateescape").split("\0")):
            diff.update((folder / name).read_bytes())
        is_dirty = bool(changed or untracked)
        return {"commit": commit, "dirty": is_dirty, "diff": diff.hexdigest() if is_dirty else None}
    except (OSError, subprocess.SubprocessError):
        return None


def package_versions() -> dict[str, str | None]:
    """Python's version and those of the packages that a run's numbers depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def data_fingerprint(data: Any) -> str:
    """A hash of all training images and labels; of a collection that is read step by step, of its names, captions, and of each
    picture's length and both ends; of shards, of their names, lengths and both ends."""
    if isinstance(data, ImageSet):
        return content_hash({"images": data.train.images, "labels": data.train.labels})
    if isinstance(data, Shards):
        text = json.dumps([[shard.name, _ends(shard.open("rb"))] for shard in data.shards])
    else:
        text = json.dumps([[[picture.name, _ends(picture.open())] for picture in data.pictures], data.captions])
    return content_hash({"text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})


def _ends(stream: io.BufferedIOBase) -> str:
    """A hash of a file's length, first and last bytes: of a million pictures nobody wants to read more at every start."""
    with stream as file:
        length = file.seek(0, io.SEEK_END)
        ends = []
        for start in (0, max(0, length - END_BYTES)):
            file.seek(start)
            ends.append(file.read(END_BYTES))
    return hashlib.blake2b(b"|".join([str(length).encode(), *ends]), digest_size=8).hexdigest()


def settings_hash(config: DictConfig) -> str:
    """Of a resolved config without its paths, which may be others on another machine."""
    settings = {key: value for key, value in flat(OmegaConf.to_container(config)).items() if key not in PATHS}
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def device_name(device: torch.device) -> str:
    """Such as "cuda: NVIDIA H200" or "cpu: x86_64"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type}: {name}"


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch held on the GPU at the worst moment; on the CPU the largest size of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes
