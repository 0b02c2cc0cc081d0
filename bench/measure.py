"""What the benchmarks share: interleaved timing beside a peer, peak memory, and the lines that are printed.

A figure is measured on both sides in one run, in turn and in an order drawn anew, so that a noisy machine disturbs both
alike. Each result is one JSON line; without --json a small table for people follows.

    {"figure", "unit", "ours": {"median", "min", "max"}, "theirs": {...}, "ratio": ours / theirs, "goal", "met", ...}
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xdiffusion.cli import Parser, positive_int

Timer = Callable[[], float]
BOUNDS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `rounds` is the default of --rounds."""
    flags = Parser(description)
    flags.add_argument("--rounds", type=positive_int, default=rounds, metavar="N", help=f"measurements of each side ({rounds})")
    flags.add_argument("--threads", type=positive_int, default=2, metavar="N", help="CPU threads (2)")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides run (cpu)")
    flags.add_argument("--json", action="store_true", help="print JSON lines and nothing else")
    return flags


def prepare(args: argparse.Namespace) -> torch.device:
    """Set the number of threads, here and for child processes, and return the device.

    Raises:
        ValueError: without a GPU for --device cuda.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    return torch.device(args.device)


def timer(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Timer:
    """Seconds per call of `function`, as the mean of `calls` calls in a row."""

    def seconds() -> float:
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronize(device)
        return (time.perf_counter() - started) / calls

    return seconds


def interleave(timers: Mapping[str, Timer], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Call each timer once a round, in an order that is drawn anew; `warmup` rounds come first and do not count.

    In a fixed order a timer would always find the caches and the waiting threads that the same other one left behind.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    order = random.Random(0)
    for i in range(warmup + rounds):
        for name in order.sample(list(timers), len(timers)):
            value = timers[name]()
            if i >= warmup:
                seconds[name].append(value)
    return seconds


@dataclass(frozen=True)
class Goal:
    """`value` bounds the ratio of the medians, or ("ours") our own median."""

    value: float
    bound: str = "<="
    of: str = "ratio"

    def __str__(self) -> str:
        return f"{self.of} {self.bound} {self.value:g}"


class Report:
    """Prints each result as it comes, and a table at the end.

    Args:
        args: of `parser`.
    """

    def __init__(self, args: argparse.Namespace):
        self.json = args.json
        self.machine = {"device": device_name(args.device), "threads": args.threads, "torch": torch.__version__}
        self.results: list[dict[str, Any]] = []

    def add(
        self,
        figure: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        *,
        unit: str = "s",
        goal: Goal | None = None,
        **details: Any,
    ) -> None:
        """One figure from the measurements of both sides; a detail named `met` overrules that of the goal."""
        sides = {"ours": spread(ours), "theirs": spread(theirs)}
        ratio = significant(sides["ours"]["median"] / sides["theirs"]["median"])
        seen = {"ratio": ratio, "ours": sides["ours"]["median"]}
        result = {
            "figure": figure,
            "unit": unit,
            **sides,
            "ratio": ratio,
            "goal": goal and goal.value,
            "goal_is": goal and str(goal),
            "met": goal and BOUNDS[goal.bound](seen[goal.of], goal.value),
            **details,
            **self.machine,
        }
        self.results.append(result)
        print(json.dumps(result), flush=True)

    def finish(self) -> None:
        """The table, unless --json."""
        if self.json:
            return
        print(f"\n{'figure':<44} {'ours':>34} {'theirs':>34} {'ratio':>7}  goal")
        for r in self.results:
            goal = f"{r['goal_is']}: {'met' if r['met'] else 'not met'}" if r["goal"] is not None else "-"
            cells = [_cell(r["ours"], r["unit"]), _cell(r["theirs"], r["unit"])]
            print(f"{r['figure']:<44} {cells[0]:>34} {cells[1]:>34} {r['ratio']:>7}  {goal}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    return {name: significant(f(values)) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def significant(value: float, digits: int = 4) -> float:
    """Rounded to that many significant digits; a count stays as it is."""
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def peak_allocated(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch's allocator held at the worst moment of one call, above what it held before the call."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident(function: Callable[[], Any]) -> int:
    """Bytes by which this process grew at the worst moment of one call; measure in a fresh process, a heap stays."""
    reset_peak_resident()
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def reset_peak_resident() -> None:
    """Make the kernel forget the largest size of this process so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _cell(values: Mapping[str, float], unit: str) -> str:
    return "{median:g} [{min:g}-{max:g}] {unit}".format(unit=unit, **values)
