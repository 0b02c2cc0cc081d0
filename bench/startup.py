"""How long a command takes to answer, and a process to take its first training step: fresh processes, wall time.

    python bench/startup.py
    python bench/startup.py --figure help --json

help: `--help` of the training and the sampling script, beside diffusers' own command line.
first_step: what a fresh process spends beyond `import torch` on importing, building the model of --config_path (with a
random text encoder; training one is another figure) and taking its first step, beside importing diffusers + peft and
taking the first step of its tutorial's loop on the digits model of `peers.py`, which is imported for free. The images
are loaded on both sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from measure import Goal, Report, Timer, interleave, parser, prepare

from xdiffusion.cli import run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train": "training/image/train.py", "sample": "sampling/image/sample.py"}
PEER_HELP = "from diffusers.commands.diffusers_cli import main; main()"
HELP_GOAL = Goal(0.5, of="ours")
FIRST_STEP_GOAL = Goal(5.0, of="ours")
OUR_FIRST_STEP = """
import sys, time, torch
started = time.perf_counter()
config_path, force_cpu, *settings = sys.argv[1:]
from xdiffusion.build import build_data, build_model, load_config
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.text_encoder import initialise_text_encoder
from xdiffusion.training.trainable import make_trainable
config = load_config(config_path, ["model.text_encoder.pretrained=null", *settings])
torch.manual_seed(0)
model, data = build_model(config), build_data(config)
initialise_text_encoder(model.text_encoder, config, None, say=lambda _: None)
make_trainable(model, config, lora=False)
Trainer(DiffusionTask(model, data, config), force_cpu=force_cpu == "1").step(1)
print(time.perf_counter() - started)
"""
PEER_FIRST_STEP = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from peers import CONTEXT_DIM, CONTEXT_LENGTH, SIZES, PeerTraining, folded_digits, peer_unet
started = time.perf_counter()
import diffusers, peft
size, device = SIZES["digits"], sys.argv[2]
x0 = folded_digits(size).train.floats(slice(size.batch_size)).to(device)
context = torch.randn(size.batch_size, CONTEXT_LENGTH, CONTEXT_DIM, device=device)
PeerTraining(peer_unet(size).to(device)).step(x0, context)
print(time.perf_counter() - started)
"""


def wall(*arguments: str) -> Timer:
    """Seconds from start to end of a Python process."""

    def seconds() -> float:
        started = time.perf_counter()
        _python(*arguments)
        return time.perf_counter() - started

    return seconds


def reported(program: str, *arguments: str) -> Timer:
    """The seconds that a program counts itself and prints last."""
    return lambda: float(_python("-c", program, *arguments).split()[-1])


def _python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def measure_help(args: argparse.Namespace, report: Report) -> None:
    """`--help` of both scripts, beside one command of the peer."""
    timers = {name: wall(script, "--help") for name, script in SCRIPTS.items()}
    seconds = interleave({**timers, "theirs": wall("-c", PEER_HELP, "--help")}, args.rounds, warmup=0)
    for name in SCRIPTS:
        report.add(f"help_{name}", seconds[name], seconds["theirs"], goal=HELP_GOAL)


def measure_first_step(args: argparse.Namespace, report: Report) -> None:
    """Everything after `import torch` up to the end of the first step."""
    force_cpu = str(int(args.device == "cpu"))
    timers = {
        "ours": reported(OUR_FIRST_STEP, args.config_path, force_cpu, *args.set),
        "theirs": reported(PEER_FIRST_STEP, str(Path(__file__).parent), args.device),
    }
    seconds = interleave(timers, args.rounds, warmup=0)
    report.add("first_step", **seconds, goal=FIRST_STEP_GOAL, config=args.config_path)


FIGURES = {"help": measure_help, "first_step": measure_first_step}


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--figure", nargs="+", choices=FIGURES, default=list(FIGURES), help="what to measure")
    flags.add_argument(
        "--config_path",
        default="configs/image/digits/ddpm_24x24_v_continuous_clip.yaml",
        metavar="YAML",
        help="of first_step",
    )
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key of that config; repeatable")
    args = flags.parse_args(argv)
    prepare(args)
    report = Report(args)
    for figure in args.figure:
        FIGURES[figure](args, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
