"""Stable Diffusion 1.5 with random weights, beside diffusers + peft: nothing is downloaded.

    python bench/sd.py                      # forward, lora_file, fits
    python bench/sd.py --device cuda        # txt2img, lora_step

forward: one call of the UNet at batch 1 and 2 with the same weights (the largest difference is printed), and what it
allocates above the weights. Theirs are in diffusers' default memory layout. cpu_seconds: without waiting for other processes.

lora_file: trained parameters at rank 4 on the attention, beside peft's, and the bytes of our file.

fits: in a fresh process, one step of training/image/train.py's loop (configs/image/sd/sd15_lora.yaml, batch 1, latents and
text embeddings cached), then a 2-step txt2img with guidance; its largest resident size, beside 16 GB.

txt2img: `generate` beside StableDiffusionPipeline, DPM-Solver++ with guidance, text encoding and decoding within the time,
all parts in one precision; steps per second. The peak counts the weights.

lora_step: `Trainer.step` as the command sets it up, beside the plain loop over UNet2DConditionModel with peft's LoRA; it is
handed latents and embeddings. Both: rank 4, batch 1, gradient checkpointing, autocast, frozen weights in the lower precision
(ours by training.half_frozen_weights) and the LoRA in float32. The peak is of the whole run, setting up included.

With --compile both networks are compiled too. Both sides are on the GPU at once: 16 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import Goal, Report, interleave, parser, peak_allocated, prepare, significant, timer
from omegaconf import DictConfig
from parity_sd import peers, relative_error
from peers import PeerTraining, add_peft_lora, as_function, check_same_size, count
from schedulers import SCHEDULERS
from torch import Tensor, nn

from xdiffusion.build import build_data, build_model, build_sampling, load_config, override
from xdiffusion.checkpoints.diffusers_settings import scheduler_settings, unet_settings
from xdiffusion.cli import positive_int, run
from xdiffusion.loading import STABLE_DIFFUSION
from xdiffusion.lora import apply_lora_to_model, save_lora_weights
from xdiffusion.model import DiffusionModel, generate, generators_for

RANK, PARAMETERS, PROMPT = 4, 797_184, "a fox in the snow"
SUFFIX = {"sd15": "", "tiny": "_tiny"}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GB, LIMIT = 1e9, 16.0
FORWARD, PEAK, FASTER, AS_FAST, SIX_GB = Goal(0.95), Goal(1.0), Goal(1.1, ">="), Goal(1.0, ">="), Goal(6.0, of="ours")


def base_config(size: str, steps: int) -> DictConfig:
    """The model's config, with the solver that both sides have."""
    words = [f"sampling.{word}" for word in (*SCHEDULERS["dpm_solver"][2].split(), f"steps={steps}")]
    return override(load_config(STABLE_DIFFUSION / f"sd15{SUFFIX[size]}.yaml"), words, "bench/sd.py")


def lora_config(size: str, folder: Path, precision: str, compiled: bool = False) -> DictConfig:
    """That of a LoRA run on one picture, which is drawn into the folder."""
    import numpy as np
    from PIL import Image

    path = STABLE_DIFFUSION / f"sd15_lora{SUFFIX[size]}.yaml"
    side = load_config(path).data.image_size
    (folder / "set").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "set" / f"{PROMPT}.png")
    run_settings = [
        f"data.data_dir={folder / 'set'}", f"cache.folder={folder / 'cache'}", "lora.training.batch_size=1",
        "lora.training.gradient_accumulation_steps=1", "lora.training.num_training_steps=10000",
        f"training.mixed_precision='{precision}'", f"training.compile={str(compiled).lower()}",
        "training.caption_dropout=0",
    ]  # fmt: skip
    return load_config(path, run_settings, True)


def random_model(config: DictConfig) -> DiffusionModel:
    """Made without memory, and filled once: torch's default initialisation, also where a fresh network has zeros."""
    torch.manual_seed(0)
    model = build_model(config, without_weights=True).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    nn.init.normal_(model.text_encoder.positional_embedding, std=0.01)
    return model.eval().requires_grad_(False)


def measure_forward(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """The UNet alone."""
    config, dtype = base_config(args.size, 2), DTYPES[args.mixed_precision]
    model = random_model(config)
    theirs = peers(model, config)[0].to(device, dtype, memory_format=torch.contiguous_format)  # copies of convolutions
    networks = {"ours": model.network.to(device, dtype), "theirs": as_function(theirs)}
    details = check_same_size(model.network, theirs) | {"precision": args.mixed_precision}
    for batch in (1, 2):
        xt = torch.randn(batch, *model.latent_shape).to(device, dtype)
        time, context = torch.full((batch,), 321.0, device=device), torch.randn(batch, 77, model.text_encoder.width)
        context = context.to(device, dtype)

        def forward(network, inputs=(xt, time, context)):
            with torch.no_grad():
                return network(*inputs)

        calls = {side: partial(forward, network) for side, network in networks.items()}
        difference = significant(relative_error(calls["ours"](), calls["theirs"]()), 2)
        more = details | {"batch_size": batch, "largest_relative_difference": difference}
        cpu: dict[str, list[float]] = {side: [] for side in calls}
        timers = {side: partial(on_both_clocks, timer(call, device), cpu[side]) for side, call in calls.items()}
        seconds = interleave(timers, args.rounds)
        clocks = {f"cpu_seconds_{side}": significant(median(values[1:])) for side, values in cpu.items()}
        report.add(f"forward_batch_{batch}_{args.size}", **seconds, goal=FORWARD, **more, **clocks)
        peaks = {side: [peak_allocated(call, device) / 2**20] for side, call in calls.items()}
        report.add(f"forward_batch_{batch}_{args.size}_peak", **peaks, unit="MiB", goal=PEAK, **more)


def on_both_clocks(wall: Callable[[], float], cpu: list[float]) -> float:
    """Seconds by the wall; those of this process, which others on the machine disturb less, are put into `cpu`."""
    started = time.process_time()
    seconds = wall()
    cpu.append(time.process_time() - started)
    return seconds


def measure_lora_file(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Parameters of the LoRA on both sides, without the models' weights."""
    config = base_config(args.size, 2)
    network = apply_lora_to_model(build_model(config, without_weights=True).network, rank=RANK, alpha=RANK)
    theirs = add_peft_lora(peer_unet(config, torch.device("meta")), RANK)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_lora_weights(with_random_factors(network), path)
        size = path.stat().st_size
    counts = {"ours": count(network, True), "theirs": count(theirs, True)}
    as_known = {"goal": Goal(PARAMETERS, "==", "ours")} if args.size == "sd15" else {}
    details = {f"parameters_{side}": number for side, number in counts.items()} | {"rank": RANK, "file_bytes": size}
    rounded = {side: [number] for side, number in counts.items()}
    report.add(f"lora_parameters_{args.size}", **rounded, unit="", **as_known, **details)


def with_random_factors(network: nn.Module) -> nn.Module:
    """A network without weights whose LoRA has some: just enough to be saved."""
    for name, parameter in list(network.named_parameters()):
        if parameter.requires_grad:
            owner, _, key = name.rpartition(".")
            network.get_submodule(owner)[key] = nn.Parameter(torch.randn(parameter.shape))
    return network


def peer_unet(config: DictConfig, device: torch.device) -> nn.Module:
    """diffusers' UNet of the config's architecture with its own initialisation."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel.from_config(
            unet_settings(config.model.network, config.model.text_encoder.width, config.data.image_size // 8)
        )


def measure_fits(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """The growth of a fresh process over everything, imports included."""
    words = ["--figure", "fits", "--in_this_process", "--size", args.size, "--threads", str(args.threads)]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    peak = [found.pop("peak_bytes") / GB]
    report.add(f"fits_{args.size}", peak, [LIMIT], unit="GB", goal=Goal(1.0), theirs_is="the limit", **found)


def fits(size: str, device: torch.device) -> dict[str, float]:
    """Seconds of a LoRA step and of a 2-step txt2img with that LoRA, and the largest resident size of this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = lora_config(size, Path(folder), "no")
        model = random_model(config)
        step = lora_trainer(model, config, device)
        step_seconds = timer(step, device)()
    started = time.perf_counter()
    sampling = build_sampling(base_config(size, 2), model.schedule)
    generate(model.eval(), [PROMPT], generators_for(0, 1), **sampling)
    seconds = {"lora_step_seconds": step_seconds, "txt2img_2_steps_seconds": time.perf_counter() - started}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {name: significant(value, 3) for name, value in seconds.items()} | {"peak_bytes": peak}


def lora_trainer(model: DiffusionModel, config: DictConfig, device: torch.device) -> Callable[[], object]:
    """What training/image/train.py sets up; called, it takes the next step."""
    from xdiffusion.training.diffusion_task import DiffusionTask
    from xdiffusion.training.loop import Trainer
    from xdiffusion.training.trainable import make_trainable

    make_trainable(model, config, lora=True)
    with redirect_stdout(sys.stderr):
        trainer = Trainer(DiffusionTask(model, build_data(config), config), force_cpu=device.type == "cpu")
    return partial(next, map(trainer.step, range(1, 10_001)))


def measure_txt2img(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Whole images from a prompt."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    config, dtype = base_config(args.size, args.steps), DTYPES[args.mixed_precision]
    model = random_model(config)
    unet, vae, text = (part.to(device, dtype, memory_format=torch.contiguous_format) for part in peers(model, config))
    model.to(device, dtype)
    settings = {**scheduler_settings(config.diffusion), **SCHEDULERS["dpm_solver"][1]}
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, feature_extractor=None, safety_checker=None,
        scheduler=DPMSolverMultistepScheduler.from_config(settings), requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    sampling = build_sampling(config, model.schedule)
    _, height, width = model.image_shape

    def ours():
        return generate(model, [PROMPT], generators_for(0, 1), **sampling)

    def theirs():
        with torch.no_grad():
            words, none = (text(model.text_encoder.tokenize([p]).to(device)).last_hidden_state for p in (PROMPT, ""))
        return pipeline(
            prompt_embeds=words, negative_prompt_embeds=none, num_inference_steps=args.steps, output_type="pt",
            guidance_scale=sampling["settings"].cfg_scale, generator=generators_for(0, 1), height=height, width=width,
        ).images.cpu() * 2 - 1  # fmt: skip

    runs, figure = {"ours": ours, "theirs": theirs}, f"txt2img_{args.size}"
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GB
    drawn = ours()
    details = {"precision": args.mixed_precision, "steps": args.steps, "largest_difference": apart(drawn, theirs())}
    report.add(figure, **rates(runs, args, device, args.steps), unit="it/s", goal=FASTER, **details)
    peaks = {side: [weights + peak_allocated(call, device) / GB] for side, call in runs.items()}
    report.add(f"{figure}_peak", **peaks, unit="GB", **details)
    if args.compile:
        model.network, pipeline.unet = torch.compile(model.network), torch.compile(pipeline.unet)
        details["difference_by_compiling"] = apart(ours(), drawn)
        report.add(f"{figure}_compiled", **rates(runs, args, device, args.steps), unit="it/s", goal=AS_FAST, **details)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of images in [-1, 1]."""
    return significant(float((ours - theirs).abs().max()), 2)


def rates(runs, args: argparse.Namespace, device: torch.device, units: int = 1) -> dict[str, list[float]]:
    """Units per second of both sides."""
    seconds = interleave({side: timer(call, device, args.calls) for side, call in runs.items()}, args.rounds, warmup=2)
    return {side: [units / value for value in of_side] for side, of_side in seconds.items()}


def our_step(args: argparse.Namespace, folder: Path, device: torch.device, compiled: bool) -> Callable[[], object]:
    """Weights begin on the CPU, as the command has them; latents and embeddings are computed, and their models parked."""
    config = lora_config(args.size, folder, args.mixed_precision, compiled)
    return lora_trainer(random_model(config), config, device)


def peer_step(args: argparse.Namespace, folder: Path, device: torch.device, compiled: bool) -> Callable[[], object]:
    """diffusers' script: frozen weights in the lower precision, the LoRA in float32, autocast; without its data loader."""
    config, dtype = base_config(args.size, 2), DTYPES[args.mixed_precision]
    unet = peer_unet(config, torch.device("cpu")).to(device, dtype)
    for parameter in add_peft_lora(unet, RANK).parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    unet.enable_gradient_checkpointing()
    training = PeerTraining(unet)
    if compiled:
        training.unet = torch.compile(unet)
    side = config.data.image_size // 8
    x0 = torch.randn(1, 4, side, side, device=device)
    context = torch.randn(1, 77, config.model.text_encoder.width, device=device)

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return training.step(x0, context)

    return step


def measure_lora_step(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Images per second, and the most memory of a run."""
    details = {"precision": args.mixed_precision, "rank": RANK, "batch_size": 1}
    for compiled in (False, True) if args.compile else (False,):
        steps, peaks = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for side, make in (("ours", our_step), ("theirs", peer_step)):
                steps[side], peak = with_peak(partial(make, args, Path(folder), device, compiled), device)
                peaks[side] = [peak / GB]
            figure, goal = f"lora_step_{args.size}{'_compiled' * compiled}", AS_FAST if compiled else FASTER
            report.add(figure, **rates(steps, args, device), unit="images/s", goal=goal, **details)
            report.add(f"{figure}_peak", **peaks, unit="GB", goal=SIX_GB, **details)


def with_peak(make: Callable[[], Callable[[], object]], device: torch.device) -> tuple[Callable[[], object], int]:
    """A step, and the bytes allocated at the worst moment of making it and calling it twice; on a CPU, of a call alone."""
    if device.type == "cpu":
        step = make()
        step()
        return step, peak_allocated(step, device)
    made = []

    def make_and_call() -> None:
        made.append(make())
        for _ in range(2):
            made[0]()

    peak = peak_allocated(make_and_call, device)
    return made[0], peak


FIGURES = {
    "forward": measure_forward,
    "lora_file": measure_lora_file,
    "fits": measure_fits,
    "txt2img": measure_txt2img,
    "lora_step": measure_lora_step,
}
DEFAULT = {"cpu": ("forward", "lora_file", "fits"), "cuda": ("txt2img", "lora_step")}


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=5)
    add = flags.add_argument
    add("--figure", nargs="+", choices=FIGURES, help="what to measure (on a CPU forward, lora_file and fits)")
    add("--size", choices=SUFFIX, default="sd15", help="of the model (sd15)")
    add("--steps", type=positive_int, default=25, metavar="N", help="of txt2img (25)")
    add("--calls", type=positive_int, default=1, metavar="N", help="calls per measurement of txt2img and lora_step (1)")
    add("--mixed_precision", choices=DTYPES, help="of both sides (CPU no, GPU bf16)")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure with torch.compile too (GPU: yes)")
    add("--in_this_process", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args(argv)
    device = prepare(args)
    if args.in_this_process:
        print(json.dumps(fits(args.size, device)))
        return 0
    args.mixed_precision = args.mixed_precision or ("bf16" if args.device == "cuda" else "no")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    report = Report(args)
    for figure in args.figure or DEFAULT[args.device]:
        FIGURES[figure](args, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
