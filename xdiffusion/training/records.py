"""What a run writes beside its checkpoints: metrics.jsonl, TensorBoard, the progress bar, and the loss curve."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64
from PIL import Image
from tqdm import tqdm

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import write_atomically
from xdiffusion.data.bounded_lines import MAX_ROW, BoundedLines
from xdiffusion.training.loop import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 50
MAX_STEP, MAX_LOSS = 2**53, 3.5e38  # a float holds each step, a float32 each loss: their sums are finite


class Records:
    """The record of one run, kept up to date step by step.

    Args:
        folder: of the run.
        first_step, last_step: the steps that this process takes, if any; a resumed run appends to what is there, dropping
            lines of steps that it repeats.
    """

    def __init__(self, folder: Path, first_step: int, last_step: int):
        self.folder, self.last_step = folder, last_step
        self.metrics_path = folder / "metrics.jsonl"
        self.skipped = 0  # of the steps since TensorBoard was last told
        self._open(first_step)
        self.bar = tqdm(
            total=last_step,
            initial=first_step - 1,
            unit="step",
            desc=run_name(folder),
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds: a log file is not filled with bars
        )

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        none_taken = first_step > self.last_step

        def write(path: Path) -> None:
            with path.open("w") as file:
                kept = (m for m in read_metrics(self.metrics_path) if m["step"] < first_step or none_taken)
                file.writelines(json.dumps(m) + "\n" for m in kept)

        write_atomically(self.metrics_path, write)
        self.metrics = self.metrics_path.open("a", buffering=1)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=None if none_taken else first_step)

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
        norm = metrics.grad_norm if math.isfinite(metrics.grad_norm) else None  # fp16's overflow is no number of JSON's
        self.metrics.write(json.dumps(asdict(metrics) | {"grad_norm": norm}, allow_nan=False) + "\n")
        self.bar.update()
        self.bar.set_postfix(loss=f"{metrics.loss:.4f}", images_per_s=f"{metrics.images_per_second:.0f}", refresh=False)
        self.skipped += metrics.skipped
        if metrics.step % 10 == 0 or metrics.step == self.last_step:
            if metrics.loss_scale is not None:
                self.board.add_scalar("skipped", self.skipped, metrics.step)
            self.skipped = 0
            for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "loss_scale"):
                if getattr(metrics, name) is not None:
                    self.board.add_scalar(name, getattr(metrics, name), metrics.step)

    def sampled(self, step: int, page: Image.Image | None, said: str) -> None:
        """Record the picture of a step, where it could be drawn, and print where it is or why there is none."""
        if page is not None:
            self.board.add_image("samples", np.asarray(page), step, dataformats="HWC")
        self.say(f"step {step}: {said}")

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


def begin_with_metrics_of(origin: Path, folder: Path) -> None:
    """Replace a folder's metrics by those of another one, whose run goes on in it; TensorBoard's begin anew."""
    from torch.utils.tensorboard import SummaryWriter

    lines = (origin / "metrics.jsonl").read_bytes() if (origin / "metrics.jsonl").is_file() else b""
    write_atomically(folder / "metrics.jsonl", lambda path: path.write_bytes(lines))
    SummaryWriter(str(folder / "tensorboard"), purge_step=1).close()


def run_name(folder: Path) -> str:
    """What a run is called: its folder's name; a LoRA in the folder lora of its config goes by the config's."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  absolute() keeps `..`, which would be a name
    return f"{folder.parent.name}, LoRA" if folder.name == "lora" else folder.name


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, one by one; a last line that a killed run left unfinished is dropped.

    Other lines that say no step and loss are left out, the first of them named on stderr.

    Raises:
        ValueError: naming a line without end.
    """
    damaged, first = 0, ""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = BoundedLines(file, path)
        for line in lines:
            lines.room = MAX_ROW
            try:
                metrics = json.loads(line)
                step, loss = metrics["step"], metrics["loss"]
                are_numbers = type(step) is int and isinstance(loss, float | int)
                if not (are_numbers and 0 <= step <= MAX_STEP and abs(loss) <= MAX_LOSS):
                    raise TypeError(f"step={step!r:.40}, loss={loss!r:.40}")
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                if line.endswith("\n"):
                    damaged, first = damaged + 1, first or f"line {lines.number}: {error!r:.200}"
                continue
            yield metrics
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out, the first is {first}", file=sys.stderr)


def read_losses(path: Path) -> Float64[np.ndarray, "2 N"]:
    """The steps and the losses of a metrics.jsonl."""
    pairs = ((metrics["step"], metrics["loss"]) for metrics in read_metrics(path))
    return np.fromiter(pairs, dtype=np.dtype((float, 2))).T


def draw_loss_curve(metrics_path: Path, picture: Path) -> None:
    """The loss of each step and `smoothed`, on a logarithmic scale."""
    steps, losses = read_losses(metrics_path)
    if len(steps) < 2:
        return
    from matplotlib.figure import Figure

    middles, means = smoothed(steps, losses)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    axes.plot(middles, means, color="tab:blue", label=f"mean of {len(steps) - len(means) + 1} steps around it")
    axes.set(xlabel="step", ylabel="loss", title=run_name(metrics_path.parent))
    on_a_log_scale(axes)
    axes.legend()
    write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))


def on_a_log_scale(axes: Axes) -> None:
    """The losses in these axes; their numbers stand as they are read: 0.2, not 2 x 10^-1."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    powers = LogLocator(subs=(1, 2, 3, 5) if high < 1000 * low else (1,))
    axes.yaxis.set_major_locator(powers if high > 3 * low else MaxNLocator(6, steps=[1, 2, 5, 10]))  # else one or none
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def smoothed(steps: Float64[np.ndarray, " N"], losses: Float64[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a tenth of the run, SMOOTHING and its middle at most, and the steps in the middle of each."""
    window = min(SMOOTHING, len(losses) // 10) | 1
    half = window // 2
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    return steps[half : len(losses) - half], means
