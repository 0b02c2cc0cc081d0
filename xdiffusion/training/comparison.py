"""Runs side by side: what differs in their configs, how far they came and how fast, and their curves over each other."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import write_atomically
from xdiffusion.training.folder_lock import in_use
from xdiffusion.training.records import SMOOTHING, on_a_log_scale, read_losses, smoothed
from xdiffusion.training.run_record import flat, read_run

ABSENT = "-"  # a key that another run's config has


@dataclass(frozen=True)
class Run:
    """A run as its files tell it; name: its folder's, as short as the runs compared allow; losses: (steps, losses).

    status: its last segment's, or "cut short" where that still says "running" and no process has the folder.
    """

    name: str
    status: str
    record: dict[str, Any]
    losses: Float64[np.ndarray, "2 N"]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in some folders.

    Raises:
        CheckpointError: if one holds no run, or one that has not taken a step.
        ValueError: if one is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
    shared = os.path.commonpath(resolved) if len(resolved) > 1 else resolved[0].parent
    runs = []
    for folder, path in zip(folders, resolved):
        record, losses = read_run(folder), read_losses(folder / "metrics.jsonl")
        if not losses.size:
            raise CheckpointError(f"{folder}: its metrics.jsonl has no step")
        status = record["segments"][-1]["status"]
        if status == "running" and not in_use(folder):
            status = "cut short"
        runs.append(Run(os.path.relpath(path, shared), status, record, losses))
    return runs


def comparison_table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of text: a heading, the config keys in which the runs differ, then what came of each."""
    configs = [flat(run.record["config"]) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if any(c.get(key, ABSENT) != configs[0].get(key, ABSENT) for c in configs)]
    rows = [("", *(run.name for run in runs))]
    origins = [origin(run) for run in runs]
    rows += [(key, *(o[key] for o in origins)) for key in origins[0] if len({o[key] for o in origins}) > 1]
    rows += [(key, *(str(config.get(key, ABSENT)) for config in configs)) for key in differing]
    outcomes = [outcome(run) for run in runs]
    return rows + [(name, *(o[name] for o in outcomes)) for name in outcomes[0]]


def remark(runs: Sequence[Run]) -> str | None:
    """What the table and the curves do not show of a difference between the runs; None where they show all."""
    if len({flat(run.record["config"]).get("training.ema_decay") for run in runs}) < 2:
        return None
    return "training.ema_decay differs: these losses are of the weights before the average; evaluate.py scores the average"


def origin(run: Run) -> dict[str, str]:
    """What is trained, and from where: the config of a LoRA is also that of a model."""
    base, words = run.record.get("base"), list(map(str, run.record["segments"][0].get("command", [])))
    flag = "--load_model_weights_from_checkpoint"
    given = [*words, "-"][words.index(flag) + 1] if flag in words else ABSENT
    given = next((word.partition("=")[2] for word in words if word.startswith(f"{flag}=")), given)
    return {
        "trains": "LoRA" if "--use_lora_training" in words else "learned word" if base else "model",
        "base": str(base)[:9] if base else ABSENT,
        "begins from": given,
    }


def outcome(run: Run) -> dict[str, str]:
    """How far a run came and at what cost, over all its segments; a segment that was killed has no times.

    The steps before one at which conditions changed were not taken under the config of the table, see `run_record`.
    """
    steps, losses = run.losses
    segments = run.record["segments"]
    seconds = sum(segment.get("seconds", 0) for segment in segments)
    # a segment has none where the run went back behind where it began
    timed = sum(max(0, s["last_step"] - s["first_step"] + 1) for s in segments if "seconds" in s)
    last = segments[-1]
    peak = max(segment.get("peak_memory_bytes", 0) for segment in segments)
    git = last.get("git") or {}
    changes = f" + changes {(git.get('diff') or '')[:6]}".rstrip() if git.get("dirty") else ""
    return {
        "status": run.status,
        "steps": f"{steps[-1]:.0f}",
        f"loss, mean of last {SMOOTHING}": f"{math.fsum(losses[-SMOOTHING:]) / len(losses[-SMOOTHING:]):.4f}",
        "smallest smoothed loss": f"{smoothed(steps, losses)[1].min():.4f}",
        "steps/s": f"{timed / seconds:.3g}" if seconds else "-",
        "seconds": f"{seconds:.1f}" if seconds else "-",
        "peak memory, MB": f"{peak / 2**20:.0f}" if peak else "-",
        "starts": str(len(segments)),
        "conditions changed at step": ", ".join(str(s["first_step"]) for s in segments if s.get("changes")) or "-",
        "device": last.get("device", "-"),
        "commit": git.get("commit", "-")[:9] + changes,
        "data": run.record.get("data", {}).get("fingerprint", "-")[:9],
    }


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def draw_curves(runs: Sequence[Run], picture: Path) -> None:
    """The smoothed losses of all runs over the steps, on a logarithmic scale, with the losses themselves behind them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        steps, losses = run.losses
        (line,) = axes.plot(*smoothed(steps, losses), label=run.name, zorder=2)
        axes.plot(steps, losses, color=line.get_color(), alpha=0.15, linewidth=0.8, zorder=1)
    axes.set(xlabel="step", ylabel="loss, running mean")
    on_a_log_scale(axes)
    axes.legend()
    write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))
