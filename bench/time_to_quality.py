"""Seconds of training from random weights to a prompt accuracy of 0.95 on MNIST, beside a diffusers tutorial's recipe.

    python bench/time_to_quality.py --data_dir ../shared/data/mnist8k
    python bench/time_to_quality.py --config_path configs/image/digits/ddpm_24x24_v_continuous_clip.yaml

Prompt accuracy: the share of 200 samples in which the judge, a classifier of the real images, sees the prompted class.
The clock holds loading, building and training. It stops while the judge is trained, and while samples are scored: every
--evaluate_every seconds of training, or a tenth of the time so far where that is longer, by one rule for both sides.

Ours is the config as it stands, its tiny CLIP trained from nothing within the clock; scored with its averaged weights
and its own sampler. Theirs is a three-level UNet2DConditionModel on the plain pixels whose width brings its parameters
closest to ours, trained as the tutorials do: DDPM noise, eps loss, AdamW 1e-4, 500 warm-up steps, batch 64; scored with
DDIM in 50 steps. It is given, free of charge, the trained text encoder's embeddings (so that both are conditioned
alike, as the prompts are what is scored), our batches from memory, our caption dropout and our guidance scale.

A side that does not get there within --max_seconds is reported with the seconds that it used, and `ratio_is` says that
the ratio is a bound.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from measure import Goal, Report, parser, prepare
from omegaconf import DictConfig
from peers import PeerTraining, as_function, count, peer_sample, prompt_accuracy
from torch import Tensor, nn

from xdiffusion.build import build_data, build_model, build_sampling, clip_config, load_config
from xdiffusion.cli import positive_int, run
from xdiffusion.config_files import assignment
from xdiffusion.data.image_set import ImageSet
from xdiffusion.evaluation.judge import Judge
from xdiffusion.model import DiffusionModel, generate, generators_for, initial_noise
from xdiffusion.places import JUDGE_FOLDER
from xdiffusion.scoring import cached_judge
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.training.contrastive import ContrastiveModel, train_contrastive
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.randomness import DataOrder, generator_at
from xdiffusion.training.settings import settings_of
from xdiffusion.training.text_encoder import TINY, initialise_text_encoder
from xdiffusion.training.trainable import make_trainable

GOAL = Goal(0.33)
PEER_BATCH_SIZE = 64
PEER_STEPS = 50
LOOK_FACTOR = 0.1
Draw = Callable[[list[str]], Tensor]


@dataclass
class Side:
    """One side: its step, how it draws prompts, what its setting up took, and how long it may go on."""

    step: Callable[[int], object]
    draw: Draw
    seconds: float
    parameters: int
    last_step: int | None = None
    reached: bool = False
    history: list[tuple[float, float]] = field(default_factory=list)


def our_side(config: DictConfig, device: torch.device) -> tuple[Side, DiffusionModel]:
    """A run of `training/image/train.py`, without its files."""
    started = time.perf_counter()
    torch.manual_seed(config.training.seed)
    model, data = build_model(config), build_data(config)
    if config.model.text_encoder.pretrained == TINY:
        towers = ContrastiveModel(model.text_encoder, image_size=data.image_size, channels=data.channels)
        clip = clip_config(config)
        train_contrastive(towers, data, settings_of(clip, "training"), settings_of(clip, "optimizer"))
        model.text_encoder.requires_grad_(False).eval()
    else:
        initialise_text_encoder(model.text_encoder, config, None, say=lambda _: None)
    make_trainable(model, config, lora=False)
    trainer = Trainer(DiffusionTask(model, data, config), force_cpu=device.type == "cpu")
    sampling = build_sampling(config, model.schedule)

    def draw(prompts: list[str]) -> Tensor:
        model.eval()
        with trainer.ema.in_place():
            images = generate(model, prompts, generators_for(0, len(prompts)), **sampling)
        model.train()
        return images

    seconds = time.perf_counter() - started
    return Side(trainer.step, draw, seconds, count(model.network), config.training.num_training_steps), model


def peer_side(config: DictConfig, embed: PromptCache, parameters: int, device: torch.device) -> Side:
    """The tutorial's loop on the same images and embeddings."""
    from diffusers import DDIMScheduler

    seed, dropout = config.training.seed, config.training.caption_dropout
    torch.manual_seed(seed)
    data = build_data(config)
    build = peer_unet_of_about(parameters, data, embed.encoder.width)  # what is ours to find out is not on their clock
    started = time.perf_counter()
    torch.manual_seed(seed)
    data, unet = build_data(config), build().to(device)
    training = PeerTraining(unet)
    order = DataOrder(len(data.train), PEER_BATCH_SIZE, seed)
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)  # clipping spoils guided DDIM there

    def step(number: int) -> None:
        wording, dropped = torch.rand(2, PEER_BATCH_SIZE, generator=generator_at(seed, "captions", number))
        batch = data.batch(order.indices(number - 1), wording)
        captions = ["" if d < dropout else c for c, d in zip(batch.captions, dropped.tolist())]
        training.step(batch.images.to(device), embed(captions))

    def draw(prompts: list[str]) -> Tensor:
        unet.eval()
        noise = initial_noise((data.channels, data.image_size, data.image_size), generators_for(0, len(prompts))).to(device)
        settings = {"steps": PEER_STEPS, "cfg_scale": config.sampling.cfg_scale}
        images = peer_sample(as_function(unet), scheduler, noise, embed(prompts), embed([""]), **settings)
        unet.train()
        return images.clamp(-1, 1).float().cpu()

    return Side(step, draw, time.perf_counter() - started, count(unet))


def peer_unet_of_about(parameters: int, data: ImageSet, context_dim: int) -> Callable[[], nn.Module]:
    """Builds diffusers' UNet of widths (w, 2w, 2w), attention below the top, with w chosen for the number of parameters."""
    from diffusers import UNet2DConditionModel

    def build(width: int) -> nn.Module:
        return UNet2DConditionModel(
            sample_size=data.image_size,
            in_channels=data.channels,
            out_channels=data.channels,
            block_out_channels=(width, 2 * width, 2 * width),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=context_dim,
            attention_head_dim=max(1, width // 16),
            norm_num_groups=8,
        )

    def distance(width: int) -> float:
        with torch.device("meta"):
            return abs(count(build(width)) - parameters)

    return partial(build, min(range(8, 257, 8), key=distance))


def race(side: Side, score: Callable[[Draw], float], name: str, args: argparse.Namespace) -> None:
    """Train until the target, the time limit or the recipe's last step; the clock stands still while scoring."""
    step, next_look = 0, args.evaluate_every
    while not side.reached:
        step += 1
        started = time.perf_counter()
        side.step(step)
        side.seconds += time.perf_counter() - started
        over = side.seconds >= args.max_seconds or step == side.last_step
        if not over and side.seconds < next_look:
            continue
        accuracy = score(side.draw)
        side.history.append((round(side.seconds, 1), round(accuracy, 4)))
        side.reached = accuracy >= args.target
        print(f"{name}: step {step}, {side.seconds:.0f} s, prompt accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
        if over:
            return
        next_look = side.seconds + max(args.evaluate_every, LOOK_FACTOR * side.seconds)


def scorer(data: ImageSet, judge: Judge, args: argparse.Namespace) -> Callable[[Draw], float]:
    """Prompt accuracy over all samples, or over the first fifth alone where that is far from the target."""
    labels = torch.arange(args.num_samples) % data.prompts.num_classes
    prompts = data.prompts.choose(labels, torch.rand(args.num_samples, generator=torch.Generator().manual_seed(0)))

    def score(draw: Draw) -> float:
        few = max(1, args.num_samples // 5)
        accuracy = prompt_accuracy(judge, draw(prompts[:few]), labels[:few])
        return accuracy if accuracy < args.target - 0.2 else prompt_accuracy(judge, draw(prompts), labels)

    return score


def ratio_is(ours: bool, theirs: bool) -> str:
    """What the ratio means, given which side reached the target everywhere."""
    return {
        (True, True): "measured",
        (True, False): "at most this: theirs did not reach the target",
        (False, True): "at least this: ours did not reach the target",
        (False, False): "nothing: neither side reached the target",
    }[ours, theirs]


def measure(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Both sides once per round, each round with another seed, as one result."""
    runs: dict[str, list[Side]] = {"ours": [], "theirs": []}
    for seed in range(args.rounds):
        data_dir = [assignment("data.data_dir", args.data_dir)] if args.data_dir else []
        config = load_config(args.config_path, [*data_dir, *args.set, f"training.seed={seed}"])
        data = build_data(config)
        judge, judge_accuracy = cached_judge(data, args.judge_path)
        score = scorer(data, judge, args)
        ours, model = our_side(config, device)
        race(ours, score, "ours", args)
        theirs = peer_side(config, PromptCache(model.text_encoder), ours.parameters, device)
        race(theirs, score, "theirs", args)
        runs["ours"].append(ours)
        runs["theirs"].append(theirs)

    reached = {side: all(one.reached for one in of_side) for side, of_side in runs.items()}
    details = {"ratio_is": ratio_is(**reached), "target": args.target, "judge_accuracy": judge_accuracy}
    if not reached["ours"]:
        details["met"] = False
    for side, of_side in runs.items():
        details[f"reached_{side}"] = [one.reached for one in of_side]
        details[f"parameters_{side}"] = of_side[0].parameters
        details[f"history_{side}"] = [one.history for one in of_side]
    seconds = {side: [one.seconds for one in of_side] for side, of_side in runs.items()}
    report.add("time_to_quality", **seconds, goal=GOAL, **details, config=args.config_path, dataset=data.name)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=1)
    add = flags.add_argument
    add(
        "--config_path",
        default="configs/image/mnist/ddpm_24x24_v_continuous_clip.yaml",
        metavar="YAML",
        help="our recipe",
    )
    add("--data_dir", metavar="DIR", help="a folder that torchvision's MNIST reads")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key of the config; repeatable")
    add("--target", type=float, default=0.95, metavar="A", help="the prompt accuracy (0.95)")
    add("--num_samples", type=positive_int, default=200, metavar="N", help="samples per evaluation (200)")
    add("--evaluate_every", type=float, default=20, metavar="S", help="seconds of training between evaluations (20)")
    add("--max_seconds", type=float, default=1800, metavar="S", help="of training, for each side (1800)")
    add("--judge_path", type=Path, default=JUDGE_FOLDER, metavar="DIR", help="where judges are kept")
    args = flags.parse_args(argv)
    device = prepare(args)
    report = Report(args)
    measure(args, device, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
