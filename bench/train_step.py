"""A training step of the base model and of a LoRA on it, beside diffusers + peft: seconds and peak memory.

    python bench/train_step.py
    python bench/train_step.py --size digits --device cuda --json

Ours is `Trainer.step`, all of it: batch, captions, text embedding, objective, clipping, AdamW, moving average. Theirs
is UNet2DConditionModel of the same architecture and the same weights (the largest difference of a forward pass is
printed) in its tutorial's plain loop: DDPMScheduler.add_noise, F.mse_loss, clip_grad_norm_, AdamW at its defaults, and for
the base the moving average of its training scripts (EMAModel; `ratio_without_their_average` is over the loop without it).
It is handed images and text embeddings for free. LoRA: rank 4 on the q, k, v and out projections of all attentions, by peft
on their side, without an average. float32, the same batch size.

On a CPU the ratio has a floor: `gflop` are the products and convolutions of a step, `gflop_per_s_of_a_product` is what one of
two large matrices runs at beside it, and `ratio_at_that_speed` what a step that did nothing else would have over theirs.

Peak memory: on a GPU what one step allocates at its worst moment beyond what was held before it; on a CPU, where our rows
run in threads that torch's profiler does not see, by how much a fresh process grows over three steps beyond its size with
the model built.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from measure import Goal, Report, interleave, parser, peak_allocated, peak_resident, prepare, significant, timer
from peers import (
    CONTEXT_DIM,
    CONTEXT_LENGTH,
    SIZES,
    PeerTraining,
    Size,
    add_peft_lora,
    check_same_size,
    count,
    folded_digits,
    largest_difference,
    our_model,
    peer_unet,
)
from torch.utils.flop_counter import FlopCounterMode

from xdiffusion.build import load_config
from xdiffusion.cli import positive_int, run
from xdiffusion.lora import apply_lora_to_model
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
RANK = 4
SIDE = 2048  # of a matrix whose product runs as fast as the processor can
GOAL = Goal(0.85)
KINDS = {"base": "train_step", "lora": "lora_step"}
Step = Callable[[], object]


def our_step(size: Size, kind: str, device: torch.device) -> Callable[[], Step]:
    """A built model; called, it becomes a training run's step."""
    model = our_model(size, peer_unet(size))
    if kind == "lora":
        apply_lora_to_model(model.network, rank=RANK, alpha=RANK)
    else:
        model.network.requires_grad_(True)
    model.to(device)
    settings = [
        f"training.batch_size={size.batch_size}",
        "training.num_training_steps=10000",
        "diffusion.prediction=eps",
    ]

    def start() -> Step:
        trainer = Trainer(
            DiffusionTask(model, folded_digits(size), load_config(CONFIG, settings)), force_cpu=device.type == "cpu"
        )
        steps = iter(range(1, 10_001))
        return lambda: trainer.step(next(steps))

    return start


def peer_step(size: Size, kind: str, device: torch.device, average: bool | None = None) -> Callable[[], Step]:
    """The same for diffusers, on one batch that lies ready on the device; average: None is with one for the base."""
    unet = peer_unet(size)
    if kind == "lora":
        add_peft_lora(unet, RANK)
    unet.to(device)

    def start() -> Step:
        training = PeerTraining(unet, average=kind == "base" if average is None else average)
        x0 = folded_digits(size).train.floats(slice(size.batch_size)).to(device)
        context = torch.randn(size.batch_size, CONTEXT_LENGTH, CONTEXT_DIM, device=device)
        return lambda: training.step(x0, context)

    return start


SIDES = {"ours": our_step, "theirs": peer_step}


def checks(size: Size, kind: str, device: torch.device) -> dict[str, object]:
    """That both sides are of one architecture, size and result, and train as many weights."""
    peer = peer_unet(size)
    model = our_model(size, peer).to(device)
    details = check_same_size(model.network, peer.to(device))
    details["largest_relative_difference"] = float(f"{largest_difference(model.network, peer, size, device):.1e}")
    if kind == "lora":
        trained = [count(apply_lora_to_model(model.network, rank=RANK), True), count(add_peft_lora(peer, RANK), True)]
        assert trained[0] == trained[1], f"not the same LoRA: {trained}"
        details["parameters_trained"] = trained[0]
    return details


def resident(size_name: str, kind: str, side: str) -> int:
    """The growth of this process over the first steps of one side, after a tiny run that loads what is loaded late."""

    def grown(size: Size) -> int:
        start = SIDES[side](size, kind, torch.device("cpu"))

        def steps() -> None:
            step = start()
            for _ in range(3):
                step()

        return peak_resident(steps)

    grown(SIZES["tiny"])
    return grown(SIZES[size_name])


def resident_in_fresh_process(size_name: str, kind: str, side: str, threads: int) -> int:
    """`resident` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--resident",
        side,
        "--size",
        size_name,
        "--kind",
        kind,
        f"--threads={threads}",
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(size_name: str, kind: str, args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """All figures of one size and kind."""
    size, figure = SIZES[size_name], f"{KINDS[kind]}_{size_name}"
    details = {"batch_size": size.batch_size, "shape": size.shape} | checks(size, kind, device)
    steps = {side: make(size, kind, device)() for side, make in SIDES.items()}
    timed = steps | ({"plain": peer_step(size, kind, device, average=False)()} if kind == "base" else {})
    if device.type == "cpu":
        square = torch.randn(SIDE, SIDE)
        timed |= {"product": lambda: square @ square}
    seconds = interleave({side: timer(step, device, args.calls) for side, step in timed.items()}, args.rounds)
    beside: dict[str, float] = {}
    if plain := seconds.pop("plain", None):
        beside["ratio_without_their_average"] = significant(median(seconds["ours"]) / median(plain))
    if product := seconds.pop("product", None):
        with FlopCounterMode(display=False) as counter:
            steps["theirs"]()
        ceiling = 2 * SIDE**3 / median(product)
        beside |= {
            "gflop": significant(counter.get_total_flops() / 1e9),
            "gflop_per_s_of_a_product": significant(ceiling / 1e9),
        }
        beside["ratio_at_that_speed"] = significant(counter.get_total_flops() / ceiling / median(seconds["theirs"]))
    report.add(figure, **seconds, goal=GOAL, **beside, **details)

    if device.type == "cuda":
        peaks = {side: [peak_allocated(step, device) / 2**20] for side, step in steps.items()}
        report.add(f"{figure}_peak_allocated", **peaks, unit="MiB", **details)
    elif not args.skip_resident:
        grown = {
            side: [resident_in_fresh_process(size_name, kind, side, args.threads) / 2**20 for _ in range(args.processes)]
            for side in SIDES
        }
        report.add(f"{figure}_peak_resident", **grown, unit="MiB", **details)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=15)
    flags.add_argument("--size", nargs="+", choices=SIZES, default=["digits", "mnist"], help="of model and batch")
    flags.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="which step")
    flags.add_argument("--calls", type=positive_int, default=3, metavar="N", help="steps per measurement (3)")
    flags.add_argument(
        "--processes",
        type=positive_int,
        default=3,
        metavar="N",
        help="fresh processes per side for resident memory (3)",
    )
    flags.add_argument("--skip_resident", action="store_true", help="do not measure fresh processes")
    flags.add_argument("--resident", choices=SIDES, help="print this process's growth and stop")
    args = flags.parse_args(argv)
    device = prepare(args)
    if args.resident:
        print(resident(args.size[0], args.kind[0], args.resident))
        return 0
    report = Report(args)
    for size_name in args.size:
        for kind in args.kind:
            measure(size_name, kind, args, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
