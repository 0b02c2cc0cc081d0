"""Entry scripts run by tests: in this process with the exit status that a shell would see, or in one of their own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from xdiffusion.cli import run

ROOT = Path(__file__).resolve().parent.parent
TRAIN, TRAIN_CLIP, DEMO = "training/image/train.py", "training/clip/train.py", "training/image/demo.py"
SAMPLE, SAMPLE_MNIST = "sampling/image/sample.py", "sampling/image/mnist/sample.py"
EVALUATE, ABLATE = "sampling/image/evaluate.py", "training/image/ablate_lora.py"


def run_script(script: str, *words: object) -> int:
    """Run a script of this repository with the words of a command line; returns its exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the run before
    main = runpy.run_path(str(ROOT / script))["main"]
    try:
        return run(main, [str(word) for word in words])
    except SystemExit as stop:  # argparse
        return stop.code


def run_process(script: str, *words: object, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """The same as a command of its own, with options of the interpreter."""
    command = [sys.executable, *python, str(ROOT / script), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def set_words(overrides: list[str]) -> list[str]:
    """["a.b=c", ...] -> ["--set", "a.b=c", ...]."""
    return [word for override in overrides for word in ("--set", override)]


def files_in(folder: Path) -> set[str]:
    """The files below a folder and the folders without any, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())}
