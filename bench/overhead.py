"""What a run costs beside its forward pass, backward pass and optimizer step, and how long a checkpoint holds it up.

    python bench/overhead.py

overhead: the digits' config, steps of `Trainer.step` with their record in metrics.jsonl and TensorBoard, saving and
sampling off. The time within the objective (noise, network, loss), the backward pass and the optimizer's step is "theirs",
the whole step "ours": the ratio less 1 is everything else (batch, captions, clipping, moving average, records). All captions
have been embedded before, which a run does once.

row_threads: where threads share the rows of a batch (training/row_threads.py), the passes last until the shares' gradients
are added up, as they do where torch itself shares out each operation. What is not computing in them: "theirs" is from the
first thread's beginning to the last one's end, with the forming of W', "ours" adds waking the threads and adding up.

checkpoint_base, checkpoint_lora: a state of so many MB (weights, two moments) besides its weights file: the seconds until
`save` returns and training goes on are "ours", until both files are on the disk "theirs".
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from measure import Goal, Report, parser, prepare
from torch import nn

from xdiffusion.build import build_data, build_model, load_config
from xdiffusion.cli import REPOSITORY, positive_int, run
from xdiffusion.diffusion import objective
from xdiffusion.lora import apply_lora_to_model
from xdiffusion.training import diffusion_task
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.divergence import LossWatch
from xdiffusion.training.ema import EMA
from xdiffusion.training.loop import Trainer
from xdiffusion.training.packed_weights import PackedWeights
from xdiffusion.training.records import Records
from xdiffusion.training.state import RunCheckpoints
from xdiffusion.training.trainable import make_trainable
from xdiffusion.training.weights_files import AdapterWeights, ModelWeights

CONFIG = REPOSITORY / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=60)
    flags.add_argument("--megabytes", type=positive_int, default=100, metavar="N", help="of the state (100)")
    flags.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the digits' config; repeatable")
    args = flags.parse_args(argv)
    device = prepare(args)
    report = Report(args)
    config = load_config(CONFIG, ["model.text_encoder.pretrained=null", *args.set])
    for kind in ("base", "lora"):
        spent = steps(config, kind == "lora", args.rounds, device)
        report.add(f"overhead_{kind}", spent.whole, spent.needed, goal=Goal(1.03))
        if spent.in_rows:
            report.add(f"row_threads_{kind}", spent.passes, spent.in_rows)
    for kind in ("base", "lora"):
        blocked, written = writes(args.megabytes, max(1, args.rounds // 10), lora=kind == "lora")
        report.add(f"checkpoint_{kind}", blocked, written, goal=Goal(0.5, of="ours"), megabytes=args.megabytes)
    report.finish()
    return 0


class Spent(NamedTuple):
    """Seconds of each step: the whole, the passes and the optimizer's step, the passes alone, and computing in row threads."""

    whole: list[float]
    needed: list[float]
    passes: list[float]
    in_rows: list[float]


def steps(config: Any, lora: bool, rounds: int, device: torch.device) -> Spent:
    """What steps of a run take, once it is warm."""
    torch.manual_seed(0)
    model = build_model(config)
    make_trainable(model, config, lora=lora)
    trainer = Trainer(DiffusionTask(model, build_data(config), config), force_cpu=device.type == "cpu")
    trainer.task.embed([caption for captions in trainer.task.data.prompts.captions for caption in captions])
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)  # beginning and end, of a step

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            synchronize(device)
            spans[kind].append((started, time.perf_counter()))
            return result

        return call

    def seconds(kind: str) -> float:
        return sum(end - start for start, end in spans[kind])

    trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
    rows = trainer.row_threads
    within = "passes" if rows is None else "rows"
    passes = {name: timed(within, getattr(torch.autograd, name)) for name in ("backward", "grad")}
    if rows is not None:
        rows.backward = timed("passes", rows.backward)
        for layer in rows.layers:
            layer.effective_weight = timed("forming", layer.effective_weight)  # once a step, for all rows
    spent = Spent([], [], [], [])
    with (
        tempfile.TemporaryDirectory() as folder,
        Records(Path(folder), 1, rounds + 3) as records,
        patch.multiple(torch.autograd, **passes),
        patch.object(diffusion_task, "loss", timed(within, objective.loss)),
    ):
        for step in range(1, rounds + 4):
            spans.clear()
            started = time.perf_counter()
            records.step(trainer.step(step))
            synchronize(device)
            if step <= 3:  # they warm up
                continue
            spent.whole.append(time.perf_counter() - started)
            spent.passes.append(seconds("passes"))
            spent.needed.append(seconds("passes") + seconds("optimizer"))
            if spans["rows"]:
                begun, ended = zip(*spans["rows"])
                spent.in_rows.append(max(ended) - min(begun) + seconds("forming"))
    return spent


def writes(megabytes: int, rounds: int, *, lora: bool) -> tuple[list[float], list[float]]:
    """Seconds until a checkpoint's save returns, and until it is on the disk."""
    size = 1024
    layers = max(1, megabytes * 2**20 // (3 * 4 * size * size))  # weights and two moments in float32
    model = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(layers))
    model.image_shape, model.text_encoder = (1, size, size), SimpleNamespace(learned_tokens=dict)
    files = ModelWeights(load_config(CONFIG))
    if lora:
        apply_lora_to_model(model, rank=size // 2, target_modules="all")  # as many factors as weights
        files = AdapterWeights(load_config(CONFIG, (), True), "0" * 32)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    packed = PackedWeights({1.0: list(trainable.values())})
    optimizer = torch.optim.AdamW(packed.updated, fused=True)
    for parameter in packed.updated:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trainer = SimpleNamespace(
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        packed=packed,
        by_name=lambda tensors: dict(zip(trainable, packed.parts(tensors))),
        ema=EMA(packed.updated, 0.9),
        accelerator=SimpleNamespace(scaler=None, is_main_process=True),
        watch=LossWatch(None),
        rollbacks=0,
    )
    blocked, written = [], []
    with tempfile.TemporaryDirectory(dir=REPOSITORY) as folder:  # /tmp may be memory
        checkpoints = RunCheckpoints(Path(folder), files)
        for step in range(1, rounds + 1):
            started = time.perf_counter()
            with trainer.ema.in_place():
                checkpoints.save(trainer, step)
            blocked.append(time.perf_counter() - started)
            checkpoints.finish()
            written.append(time.perf_counter() - started)
    return blocked, written


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(run(main))
