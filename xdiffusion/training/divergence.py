"""Runs that diverge: a loss that is not finite or far above those before it, and what is written of it."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdiffusion.checkpoints.writing import write_text

REMEMBERED = 100
NEEDED = 20
MOST_SKIPPED = 20  # steps in a row that fp16's scaler skips: from 65536 its scale is down to 1/16 then


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite (with fp16 MOST_SKIPPED times in a row), or the loss far above those before it,
    or a weight that is to be saved is not finite.

    report: what is known of the step: its losses, gradient norm, learning rate, and the indices of its batch.
    """

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report


class LossWatch:
    """The last losses of a run.

    Args:
        stop_above: a loss of more than this many times their median is too much; None never.
    """

    def __init__(self, stop_above: float | None):
        self.stop_above = stop_above
        self.losses: deque[float] = deque(maxlen=REMEMBERED)

    def limit(self) -> float:
        """The largest loss that is let through; infinite while there are too few to compare with."""
        if self.stop_above is None or len(self.losses) < NEEDED:
            return math.inf
        return self.stop_above * statistics.median(self.losses)

    def restore(self, losses: Sequence[float]) -> None:
        """Go on from the losses of a saved run."""
        self.losses = deque(losses, maxlen=REMEMBERED)


def write_report(folder: Path, error: TrainingDiverged) -> Path:
    """Write diverged.json: the step, its numbers, the losses before it and the indices of its batch.

    After N rollbacks it is diverged-N.json. JSON knows no number that is not finite: it is written as the text "nan" or "inf".
    """
    rollbacks = error.report["rollbacks"]
    path = folder / (f"diverged-{rollbacks}.json" if rollbacks else "diverged.json")
    report = {key: value if _finite(value) else str(value) for key, value in error.report.items()}
    write_text(path, json.dumps({"reason": str(error)} | report, indent=1, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
