"""What a run writes beside its checkpoints: metrics.jsonl, TensorBoard, the progress bar, and the loss curve."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from tqdm import tqdm

from xdiffusion.checkpoints.files import CheckpointError, write_atomically
from xdiffusion.training.loop import StepMetrics

SMOOTHING = 50


class Records:
    """The record of one run, kept up to date step by step.

    Args:
        folder: of the run.
        first_step, last_step: the steps that this process takes; a resumed run appends to what is there, dropping
            lines of steps that it repeats.
    """

    def __init__(self, folder: Path, first_step: int, last_step: int):
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self._open(first_step)
        self.bar = tqdm(
            total=last_step,
            initial=first_step - 1,
            unit="step",
            desc=folder.name,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds: a log file is not filled with bars
        )

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [m for m in read_metrics(self.metrics_path) if m["step"] < first_step]
        text = "".join(json.dumps(m) + "\n" for m in kept)
        write_atomically(self.metrics_path, lambda path: path.write_text(text))
        self.metrics = self.metrics_path.open("a", buffering=1)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)

    def go_back(self, first_step: int, line: str) -> None:
        """Forget the steps from first_step on, which the run will repeat; print why."""
        self.metrics.close()
        self.board.close()
        self._open(first_step)
        self.say(line)
        self.bar.n = first_step - 1
        self.bar.refresh()

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        self.metrics.write(json.dumps(asdict(metrics)) + "\n")
        self.bar.update()
        self.bar.set_postfix(loss=f"{metrics.loss:.4f}", images_per_s=f"{metrics.images_per_second:.0f}", refresh=False)
        if metrics.step % 10 == 0:
            for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "loss_scale"):
                if getattr(metrics, name) is not None:
                    self.board.add_scalar(name, getattr(metrics, name), metrics.step)

    def image(self, name: str, page: Image.Image, step: int) -> None:
        """Record a picture."""
        self.board.add_image(name, np.asarray(page), step, dataformats="HWC")

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        for close in (self.metrics.close, self.board.close, self._draw):
            with suppress(OSError, CheckpointError) if error else nullcontext():  # a full disk hides no first error
                close()

    def _draw(self) -> None:
        draw_loss_curve(self.metrics_path, self.folder / "loss.png")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is dropped."""
    metrics = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return metrics


def draw_loss_curve(metrics_path: Path, picture: Path) -> None:
    """The loss of each step and its running mean, on a logarithmic scale."""
    metrics = read_metrics(metrics_path)
    if len(metrics) < 2:
        return
    from matplotlib.figure import Figure

    steps = np.array([m["step"] for m in metrics])
    losses = np.array([m["loss"] for m in metrics])
    window = min(SMOOTHING, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=str(metrics_path.parent.name))
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))
