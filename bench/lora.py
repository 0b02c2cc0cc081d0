"""What a LoRA costs where it is used: in a training step, in sampling, and in converting files of Stable Diffusion's size.

    python bench/lora.py

Training: steps of one trainer on the digits' UNet, with our adapters and with peft's on the same module (q, k, v and out
projections, rank 4); bench/train_step.py has the step beside diffusers + peft. Sampling: the digits' model with the LoRA of
its config, 32 images, 10 steps with guidance; "theirs" is the same model without a LoRA, and the same model a second time
says how far apart two equal models are measured. Conversion: a LoRA of rank 16 for all linear layers of Stable Diffusion
1.5, from each format that is written to native and back, each in a fresh process that has torch; seconds, and by how much
the process grows.
The layer alone is in bench/lora_linear.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import Goal, Report, interleave, parser, prepare, timer

from xdiffusion.build import build_model, build_sampling, load_config
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, sd_layer_table, write_lora
from xdiffusion.cli import positive_int, run
from xdiffusion.data.digits import load_digits
from xdiffusion.lora import apply_lora_to_model, get_lora_parameters, merge_lora_weights
from xdiffusion.model import DiffusionModel, generate, generators_for
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.trainable import make_trainable

CONFIG = Path(__file__).resolve().parents[1] / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
RANK, TARGETS = 4, ["to_q", "to_k", "to_v", "to_out"]
STEP, UNMERGED, MERGED = Goal(0.85), Goal(1.10), Goal(1.01)
SECONDS, MIB = Goal(2.0, of="ours"), Goal(200.0, of="ours")
CONVERT = """
import json, sys, time, torch
from measure import peak_resident
started = time.perf_counter()
from pathlib import Path
from xdiffusion.checkpoints.lora_formats import read_lora, sd_layer_table, write_lora
def convert():
    names = sd_layer_table("sd15")
    write_lora(read_lora(Path(sys.argv[1]), names), Path(sys.argv[2]), sys.argv[3], names)
grown = peak_resident(convert)
print(json.dumps([time.perf_counter() - started, grown / 2**20]))
"""


def training_step(side: str, device: torch.device) -> Callable[[], object]:
    """The digits' model of its config with a fresh LoRA of ours or of peft's, in a run of our trainer."""
    from peft import LoraConfig, inject_adapter_in_model

    config = load_config(CONFIG, ["model.text_encoder.pretrained=null", "training.num_training_steps=10000"])
    torch.manual_seed(0)
    model = build_model(config).requires_grad_(False)
    if side == "ours":
        apply_lora_to_model(model.network, rank=RANK, alpha=RANK, target_modules=TARGETS)
    else:
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), model.network)
    trainer = Trainer(DiffusionTask(model.to(device), load_digits(24), config), force_cpu=device.type == "cpu")
    steps = iter(range(1, 10_001))
    return lambda: trainer.step(next(steps))


def measure_training(rounds: int, device: torch.device, report: Report) -> None:
    """Seconds of a step with our adapters and with peft's."""
    timers = {side: timer(training_step(side, device), device, calls=3) for side in ("ours", "theirs")}
    report.add("lora_step_same_module", **interleave(timers, rounds), goal=STEP)


def models() -> dict[str, DiffusionModel]:
    """The same base four times: alone, alone again, with a LoRA whose B is not zero, and with that LoRA merged."""
    config = load_config(CONFIG, ["model.text_encoder.pretrained=null"])
    built = {}
    for kind in ("base", "again", "unmerged", "merged"):
        torch.manual_seed(0)
        built[kind] = build_model(config).eval()
        make_trainable(built[kind], config, lora=kind in ("unmerged", "merged"))
        for parameter in get_lora_parameters(built[kind]):
            torch.nn.init.normal_(parameter, std=0.02)
    merge_lora_weights(built["merged"])
    return built


def measure_sampling(num_samples: int, rounds: int, device: torch.device, report: Report) -> None:
    """Seconds of sampling, over those of the base."""
    config = load_config(CONFIG)
    prompts = [str(i % 10) for i in range(num_samples)]
    timers = {}
    for kind, model in models().items():
        model.to(device)
        sampling = build_sampling(config, model.schedule)

        def sample(model=model, sampling=sampling):
            return generate(model, prompts, generators_for(0, num_samples), **sampling)

        timers[kind] = timer(sample, device)
    seconds = interleave(timers, rounds)
    report.add("lora_sampling_unmerged", seconds["unmerged"], seconds["base"], goal=UNMERGED)
    report.add("lora_sampling_merged", seconds["merged"], seconds["base"], goal=MERGED)
    report.add("lora_sampling_control", seconds["again"], seconds["base"])


def measure_conversion(rank: int, rounds: int, report: Report) -> None:
    """Seconds and MiB of converting a large file; "theirs" is the way back to native."""
    layers = {name: shape for name, shape in sd_layer_table("sd15").items() if len(shape) == 2}
    modules = {n: LoRAFactors(torch.randn(rank, i), torch.randn(o, rank), float(rank)) for n, (o, i) in layers.items()}
    with tempfile.TemporaryDirectory() as folder:
        native = Path(folder) / "native.safetensors"
        write_lora(LoRAFile(modules), native, "native")
        for name in ("kohya", "diffusers", "diffusers-sd15"):
            assert name in FORMATS
            there, back = Path(folder) / f"{name}.safetensors", Path(folder) / "back.safetensors"
            to = [_fresh_process(native, there, name) for _ in range(rounds)]
            fro = [_fresh_process(there, back, "native") for _ in range(rounds)]
            for i, (unit, goal) in enumerate((("s", SECONDS), ("MiB", MIB))):
                figure = f"lora_convert_{name}{'_peak' if unit == 'MiB' else ''}"
                report.add(figure, [t[i] for t in to], [f[i] for f in fro], unit=unit, goal=goal, modules=len(modules))


def _fresh_process(source: Path, target: Path, name: str) -> tuple[float, float]:
    command = [sys.executable, "-c", CONVERT, str(source), str(target), name]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=9)
    flags.add_argument("--num_samples", type=positive_int, default=32, metavar="N", help="images per sampling run (32)")
    flags.add_argument("--rank", type=positive_int, default=16, metavar="R", help="of the converted LoRA (16)")
    args = flags.parse_args(argv)
    device = prepare(args)
    report = Report(args)
    measure_training(args.rounds, device, report)
    measure_sampling(args.num_samples, args.rounds, device, report)
    measure_conversion(args.rank, min(args.rounds, 3), report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
