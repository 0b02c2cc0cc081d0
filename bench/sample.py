"""Sampling with guidance beside diffusers: the same solver at 10 and 50 steps, and the way to equal accuracy.

    python bench/sample.py
    python bench/sample.py --checkpoint output/image/digits/ddpm_24x24_v_continuous_clip/diffusion-1700.safetensors

sample_<solver>_<steps>: `generate` with dpm_solver or ddim beside a pipeline's loop over UNet2DConditionModel with
DPMSolverMultistepScheduler or DDIMScheduler, both halves of the guidance in one batch: the same architecture, weights,
noise, timesteps and float32. `largest_difference` is that of the images. Ours embeds its prompts within the time;
theirs is handed the embeddings.

sample_equal_accuracy: DPM-Solver++ in 10 steps, beside theirs, DDIM in 50; the goal's figure. That the two draw equally
well is a property of a trained model: with --checkpoint what its config says is run beside their DDIM, and both are scored
(share of samples in which the judge sees the prompted class). diffusers' scheduler then calls the checkpoint's own network,
which diffusers cannot express, so that this ratio is of the solvers alone. Its clip_sample stays off: with guidance it
leaves 0.26 of an accuracy of 0.99 on the digits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import Goal, Report, interleave, parser, prepare, significant, timer
from peers import SIZES, Size, as_function, check_same_size, our_model, peer_sample, peer_unet, prompt_accuracy
from torch import Tensor

from xdiffusion.cli import positive_int, run
from xdiffusion.data.captions import PROMPT_TABLES
from xdiffusion.diffusion.schedules import Schedule
from xdiffusion.model import DiffusionModel, SamplingSettings, generate, generators_for, initial_noise
from xdiffusion.places import JUDGE_FOLDER
from xdiffusion.samplers.ddim import sample_ddim
from xdiffusion.samplers.dpm_solver import sample_dpm_solver
from xdiffusion.samplers.time_grids import uniform_times

SOLVERS = {"dpm_solver": sample_dpm_solver, "ddim": sample_ddim}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
EQUAL_ACCURACY_GOAL = Goal(0.35)
OURS, THEIRS = ("dpm_solver", 10), ("ddim", 50)
Draw = Callable[[], Tensor]


def peer_scheduler(solver: str, model: DiffusionModel):
    """diffusers' scheduler of the name, on this model's noise schedule read at 1000 steps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    arguments = {
        "trained_betas": betas(model.schedule),
        "prediction_type": PREDICTIONS[model.prediction],
        "timestep_spacing": "trailing",
    }
    if solver == "ddim":
        return DDIMScheduler(**arguments, clip_sample=False)
    return DPMSolverMultistepScheduler(**arguments, algorithm_type="dpmsolver++")


def betas(schedule: Schedule, steps: int = 1000) -> list[float]:
    """beta_n of a table whose alpha_bar is the schedule's at n / steps."""
    alpha, _ = schedule.alpha_sigma(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return (1 - (alpha[1:] / alpha[:-1]) ** 2).clamp(max=0.999999).tolist()


def our_run(model: DiffusionModel, prompts: list[str], solver: str, steps: int, cfg_scale: float) -> Draw:
    """`generate` with everything around it."""
    times, settings = uniform_times(model.schedule, steps), SamplingSettings(cfg_scale=cfg_scale, clip_x0=False)
    sampling = {"sampler": SOLVERS[solver], "times": times, "settings": settings}
    return lambda: generate(model, prompts, generators_for(0, len(prompts)), **sampling)


def peer_run(network, scheduler, model: DiffusionModel, prompts: list[str], steps: int, cfg_scale: float) -> Draw:
    """The loop over `network` from the same noise, with the embeddings ready."""
    with torch.no_grad():
        context, null_context = model.text_encoder.encode(prompts), model.text_encoder.encode([""])
    noise = initial_noise(model.latent_shape, generators_for(0, len(prompts))).to(model.device)

    def draw() -> Tensor:
        arguments = {"steps": steps, "cfg_scale": cfg_scale}
        return peer_sample(network, scheduler, noise, context, null_context, **arguments).clamp(-1, 1).float().cpu()

    return draw


def measure_random(size_name: str, args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Random weights: the same solvers on both sides, then ours in 10 steps beside theirs in 50."""
    size: Size = SIZES[size_name]
    peer = peer_unet(size).to(device).eval()
    model = our_model(size, peer).to(device).eval()
    prompts = prompts_for(args.batch_size)[0]
    details = {"batch_size": args.batch_size, "cfg_scale": args.cfg_scale} | check_same_size(model.network, peer)

    def sides(solver: str, steps: int) -> dict[str, Draw]:
        theirs = peer_run(as_function(peer), peer_scheduler(solver, model), model, prompts, steps, args.cfg_scale)
        return {"ours": our_run(model, prompts, solver, steps, args.cfg_scale), "theirs": theirs}

    for solver in SOLVERS:
        for steps in args.steps:
            runs = sides(solver, steps)
            difference = significant(float((runs["ours"]() - runs["theirs"]()).abs().max()), 2)
            seconds = interleave({side: timer(draw, device) for side, draw in runs.items()}, args.rounds, warmup=0)
            report.add(f"sample_{solver}_{steps}_{size_name}", **seconds, largest_difference=difference, **details)
    runs = {"ours": sides(*OURS)["ours"], "theirs": sides(*THEIRS)["theirs"]}
    seconds = interleave({side: timer(draw, device) for side, draw in runs.items()}, args.rounds)
    report.add(f"sample_equal_accuracy_{size_name}", **seconds, goal=EQUAL_ACCURACY_GOAL, **_named_solvers(), **details)


def measure_checkpoint(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """A trained model: time and prompt accuracy of both ways, in one pass over all samples."""
    from xdiffusion.build import build_data, build_sampling, override
    from xdiffusion.config_files import assignment
    from xdiffusion.loading import load_model
    from xdiffusion.scoring import cached_judge

    model, config = load_model(args.checkpoint)
    given = [assignment("data.data_dir", args.data_dir)] if args.data_dir else []
    data = build_data(override(config, given, "--data_dir"))
    model.to(device)
    judge, judge_accuracy = cached_judge(data, args.judge_path)
    cfg_scale, sampling = config.sampling.cfg_scale, build_sampling(config, model.schedule)
    prompts, labels = prompts_for(args.num_samples, data.name)

    def network(xt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen = model.schedule.network_time((t.double().cpu() + 1) / 1000)
        return model.network(xt, seen.to(xt.device, torch.float32).expand(len(xt)), context)

    scheduler = peer_scheduler(THEIRS[0], model)
    runs = {
        "ours": lambda: generate(model, prompts, generators_for(0, len(prompts)), **sampling),
        "theirs": peer_run(network, scheduler, model, prompts, THEIRS[1], cfg_scale),
    }
    seconds, accuracy = {}, {}
    for side, draw in runs.items():
        started = time.perf_counter()
        images = draw()
        seconds[side] = [time.perf_counter() - started]
        accuracy[f"prompt_accuracy_{side}"] = prompt_accuracy(judge, images, labels)
    details = accuracy | {"num_samples": args.num_samples, "judge_accuracy": judge_accuracy, "cfg_scale": cfg_scale}
    named = _named_solvers((config.sampling.sampler.kind, config.sampling.steps))
    report.add("sample_equal_accuracy_checkpoint", **seconds, goal=EQUAL_ACCURACY_GOAL, **named, **details)


def prompts_for(count: int, dataset: str = "image/digits") -> tuple[list[str], Tensor]:
    """Prompts spread evenly over the classes and their wordings, and the classes."""
    table = PROMPT_TABLES[dataset.removesuffix("_inverted")]
    labels = torch.arange(count) % table.num_classes
    return table.choose(labels, torch.rand(count, generator=torch.Generator().manual_seed(0))), labels


def _named_solvers(ours: tuple[str, int] = OURS) -> dict[str, str]:
    return {f"{side}_sampler": f"{solver} {steps} steps" for side, (solver, steps) in (("our", ours), ("their", THEIRS))}


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--size", nargs="+", choices=SIZES, default=["digits"], help="of the model (digits)")
    flags.add_argument("--steps", nargs="+", type=positive_int, default=[10, 50], metavar="N", help="of the solvers (10 50)")
    flags.add_argument("--batch_size", type=positive_int, default=32, metavar="N", help="images at a time (32)")
    flags.add_argument("--cfg_scale", type=float, default=2.0, metavar="S", help="strength of guidance (2)")
    flags.add_argument("--checkpoint", metavar="FILE", help="score and time a trained model of ours as well")
    flags.add_argument("--data_dir", metavar="DIR", help="of the checkpoint's data set")
    flags.add_argument("--num_samples", type=positive_int, default=200, metavar="N", help="samples of the checkpoint (200)")
    flags.add_argument("--judge_path", type=Path, default=JUDGE_FOLDER, metavar="DIR", help="where judges are kept")
    args = flags.parse_args(argv)
    device = prepare(args)
    report = Report(args)
    for size_name in args.size:
        measure_random(size_name, args, device, report)
    if args.checkpoint:
        measure_checkpoint(args, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
