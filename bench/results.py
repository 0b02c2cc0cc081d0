"""docs/results.md from scratch: our base models and LoRAs beside a diffusers + peft training, with seeds and intervals.

    python bench/results.py                                             (the embedded digits)
    python bench/results.py --data_dir ../shared/data/mnist8k           (and that copy of MNIST; any number of copies)
    python bench/results.py --mnist                                     (and all 60,000 of it, downloaded)

Ours is a config of this repository as it stands, its tiny CLIP trained from nothing for each seed, by the commands that
the README teaches. Theirs is a UNet2DConditionModel with the same levels, on the same patches (folded into channels),
its widths chosen for as many parameters; and for the style a LoRA of peft on the layers that ours adapts, its ranks chosen
for as many parameters. It sees the same images in the same order, for as many steps, by the tutorials' recipe: DDPM noise,
eps loss, AdamW, 500 warm-up steps, no averaging; once for each of --peer_learning_rate. It is given our trained text encoder,
caption dropout and guidance scale. The same code scores as many samples of both sides, theirs with 50 steps of DDIM.

Each finished row is a JSON file in --output_path: a command that was stopped is simply repeated, and goes on there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import device_name, prepare, significant
from omegaconf import DictConfig
from peers import PeerTraining, add_peft_lora, count, peer_model, peer_unet_like, peft_disabled, ranks_for
from torch import nn

from xdiffusion.build import build_data, build_sampling, load_config, override
from xdiffusion.checkpoints.diffusers import unet_name_to_diffusers
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors, write_text
from xdiffusion.cli import REPOSITORY, Parser, call_script, positive_int, run
from xdiffusion.config_files import assignment
from xdiffusion.data.image_set import ImageSet, invert
from xdiffusion.loading import load_model
from xdiffusion.model import DiffusionModel
from xdiffusion.places import JUDGE_FOLDER, OUTPUT_ROOT
from xdiffusion.scoring import Depth, score
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.training.randomness import DataOrder, generator_at
from xdiffusion.training.records import read_metrics

CONFIGS = REPOSITORY / "configs/image"
DIGITS = CONFIGS / "digits/ddpm_24x24_v_continuous_clip.yaml"
MNIST = CONFIGS / "mnist/ddpm_24x24_v_continuous_clip.yaml"
PEER_SAMPLING = [
    "sampling.sampler={kind: ddim}",
    "sampling.times={kind: uniform}",
    "sampling.steps=50",
]
COLUMNS = {
    "prompt_accuracy": "prompt accuracy",
    "frechet_distance": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "data_copying": "data copying",
    "gap_closed": "gap closed",
}
REAL = {"prompt_accuracy": "judge_accuracy", "frechet_distance": "frechet_floor_balanced"}
REAL |= {name: f"{name}_real" for name in ("precision", "recall", "coverage")}
OWN_LOSS = " Gap closed is in each side's own loss (ours v, cosine; theirs eps, linear betas): no comparison of sides."
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all rows of a data set share; words: of our training commands; scoring: of our evaluations."""

    data: ImageSet
    config_path: Path
    words: list[object]
    scoring: list[object]
    steps: int
    lora_steps: int
    args: argparse.Namespace


# --- ours: the commands ---


def our_base(folder: Path, setting: Setting, seed: int) -> Row:
    """Tiny CLIP, base model, scores."""
    clip, file = folder / "clip.safetensors", folder / f"diffusion-{setting.steps}.safetensors"
    common = ["--config_path", setting.config_path, "--seed", seed, *setting.words]
    call_script("training/clip/train.py", *common, "--output_path", clip)
    text = ["--set", f"model.text_encoder.pretrained={clip}"]
    call_script("training/image/train.py", *common, *text, *saved_once(setting.steps), "--output_path", folder)
    scores = call_script("sampling/image/evaluate.py", "--checkpoint", file, *setting.scoring)
    model, config = load_model(file)
    seconds = training_seconds(folder, config.training.batch_size)
    return json.loads(scores) | {"parameters": count(model.network), "seconds": seconds, "file": str(file)}


def our_lora(folder: Path, setting: Setting, seed: int, base: Row) -> Row:
    """A LoRA of the inverted style on our base, scores."""
    file = folder / f"diffusion-{setting.lora_steps}-lora.safetensors"
    style = ["--dataset_name", f"{setting.data.name}_inverted"]
    common = ["--config_path", setting.config_path, "--seed", seed, *setting.words, *style]
    adapt = ["--use_lora_training", "--load_model_weights_from_checkpoint", base["file"]]
    call_script("training/image/train.py", *common, *adapt, *saved_once(setting.lora_steps), "--output_path", folder)
    flags = ["--checkpoint", base["file"], "--lora_path", file, *style, *setting.scoring]
    scores = json.loads(call_script("sampling/image/evaluate.py", *flags))
    parameters = sum(f.lora_A.numel() + f.lora_B.numel() for f in read_lora(file).modules.values())
    batch_size = load_config(setting.config_path, setting.args.set, True).training.batch_size
    return scores | {"parameters": parameters, "seconds": training_seconds(folder, batch_size), "file": str(file)}


def saved_once(steps: int) -> list[object]:
    return ["--num_training_steps", steps, "--save_and_sample_every_n", steps]


def training_seconds(folder: Path, batch_size: int) -> float:
    """Of the training steps alone."""
    return round(sum(batch_size / m["images_per_second"] for m in read_metrics(folder / "metrics.jsonl")), 1)


# --- theirs: the tutorials' loop ---


def peer_base(folder: Path, setting: Setting, seed: int, learning_rate: float, ours: Row) -> Row:
    """Their UNet from nothing, scores."""
    model, config = load_model(ours["file"])
    unet, file = fresh_peer(config, seed, ours, model), folder / "unet.safetensors"
    seconds = train_peer(unet, setting.data, config, model, seed, setting.steps, learning_rate)
    save_safetensors(file, unet.state_dict(), {})
    scores = peer_scores(unet, model, setting.data, config, setting.args, has_lora=False)
    return scores | {"parameters": count(unet), "seconds": seconds, "file": str(file)}


def peer_lora(folder: Path, setting: Setting, seed: int, learning_rate: float, our_base: Row, ours: Row, base: Row) -> Row:
    """A LoRA of peft on their UNet: on the layers that ours adapts, and of as many parameters; scores."""
    model, config = load_model(our_base["file"])
    unet = fresh_peer(config, seed, our_base, model)
    unet.load_state_dict(load_safetensors(Path(base["file"]))[0])
    names = [name.removeprefix("network.") for name in read_lora(Path(ours["file"])).modules]
    layers = [unet_name_to_diffusers(f"{name}.")[:-1] for name in names]
    rank, larger = ranks_for(unet, layers, ours["parameters"])
    inverted, unet = invert(setting.data), add_peft_lora(unet, rank, layers, larger)
    parameters = count(unet, trainable=True)  # before scoring freezes them
    seconds = train_peer(unet, inverted, config, model, seed, setting.lora_steps, learning_rate)
    scores = peer_scores(unet, model, inverted, config, setting.args, has_lora=True)
    return scores | {"parameters": parameters, "seconds": seconds, "rank": rank, "larger": len(larger)}


def fresh_peer(config: DictConfig, seed: int, ours: Row, model: DiffusionModel) -> nn.Module:
    """Their UNet with random weights, of as many parameters as ours."""
    width, size = model.text_encoder.width, config.data.image_size
    return peer_unet_like(config.model.network, size, width, ours["parameters"], seed)


def train_peer(
    unet: nn.Module,
    data: ImageSet,
    config: DictConfig,
    ours: DiffusionModel,
    seed: int,
    steps: int,
    learning_rate: float,
) -> float:
    """Our batches, prompt embeddings and caption dropout in their loop; returns the seconds of the steps."""
    batch_size, dropout = config.training.batch_size, config.training.caption_dropout
    embed, order = PromptCache(ours.text_encoder), DataOrder(len(data.train), batch_size, seed)
    training = PeerTraining(unet, learning_rate=learning_rate)
    patch_size, started = config.model.network.patch_size, time.perf_counter()
    torch.manual_seed(seed)  # their loop draws its noise from the global generator
    for number in range(1, steps + 1):
        wording, dropped = torch.rand(2, batch_size, generator=generator_at(seed, "captions", number))
        batch = data.batch(order.indices(number - 1), wording)
        captions = ["" if d < dropout else c for c, d in zip(batch.captions, dropped.tolist())]
        loss = training.step(F.pixel_unshuffle(batch.images, patch_size), embed(captions))
        if number % 100 == 0:
            print(f"theirs: step {number}/{steps}, loss {loss:.4f}", file=sys.stderr, flush=True)
    return round(time.perf_counter() - started, 1)


def peer_scores(
    unet: nn.Module,
    ours: DiffusionModel,
    data: ImageSet,
    config: DictConfig,
    args: argparse.Namespace,
    *,
    has_lora: bool,
) -> Row:
    """By the code that scores ours, with 50 steps of DDIM."""
    model = peer_model(unet, config.model.network.patch_size, ours.text_encoder, ours.image_shape)
    return score(
        model,
        data,
        build_sampling(override(config, PEER_SAMPLING, "bench/results.py"), model.schedule),
        num_samples=args.num_samples,
        seed=0,
        has_lora=has_lora,
        judge_folder=JUDGE_FOLDER,
        depth=Depth(args.intervals, full=True),
        without_lora=peft_disabled,
    ).scores


# --- rows and the document ---


def setting_of(config_path: Path, data_dir: str | None, args: argparse.Namespace) -> Setting:
    """Of one data set, which is read (or downloaded) now: before hours of training on another one."""
    overrides = [*args.set, *([assignment("data.data_dir", data_dir)] if data_dir else [])]
    config, lora_config = (load_config(config_path, overrides, lora) for lora in (False, True))
    steps, lora_steps = (args.num_training_steps or c.training.num_training_steps for c in (config, lora_config))
    scoring = ["--num_samples", args.num_samples, "--full", "--intervals", args.intervals, "--json"]
    scoring += ["--data_dir", data_dir] if data_dir else []
    return Setting(build_data(config), config_path, [f"--set={o}" for o in overrides], scoring, steps, lora_steps, args)


def rows_of(setting: Setting, seeds: int) -> list[Row]:
    """All rows of one data set, those that are there already read again."""
    data, args = setting.data, setting.args
    budget = {
        "steps": [setting.steps, setting.lora_steps],
        "num_samples": args.num_samples,
        "intervals": args.intervals,
        "set": args.set,
        "images": content_hash({"train": data.train.images, "test": data.test.images}),
    }
    folder = args.output_path / f"{Path(data.name).name}-{len(data.train)}"
    rows = []

    def row(kind: str, side: str, seed: int, make: Callable[..., Row], *more: Any) -> Row:
        about = {"data": f"{data.name}, {len(data.train):,} images", "side": side, "kind": kind, "seed": seed}
        place = folder / f"{kind}-{side.replace(' ', '-')}-seed{seed}"
        rows.append(cached(place, budget, lambda: make(place, setting, seed, *more)) | about)  # a score has a seed too
        return rows[-1]

    for seed in range(seeds):
        base = row("base", "ours", seed, our_base)
        lora = row("lora", "ours", seed, our_lora, base)
        for rate in args.peer_learning_rate:
            peer = row("base", f"theirs {rate:g}", seed, peer_base, rate, base)
            row("lora", f"theirs {rate:g}", seed, peer_lora, rate, base, lora, peer)
    return rows


def cached(folder: Path, budget: dict[str, Any], make: Callable[[], Row]) -> Row:
    """The row of a folder, made if it is not there.

    Raises:
        ValueError: if there is one of another budget.
    """
    path = folder / "row.json"
    if path.is_file():
        row = json.loads(path.read_text())
        if row["budget"] != budget:
            raise ValueError(f"{path} is of another budget; name another folder with --output_path")
        return row
    row = make() | {"budget": budget}
    write_text(path, json.dumps(row, indent=1) + "\n")
    return row


def document(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """docs/results.md: for each data set the means over seeds, then every row with its intervals."""
    places = ("--output_path", "--markdown")  # of this machine
    words = [w for w, before in zip(args.argv, ["", *args.argv]) if w not in places and before not in places]
    command = " ".join(["python bench/results.py", *words])
    parts = [
        "# Results\n\nWritten by `bench/results.py`, from random weights; its text says what each side is. Ours and theirs "
        "(diffusers + peft, by learning rate) have the same images, steps, batch size and, to a percent, parameters. Scores "
        "are those of `sampling/image/evaluate.py --full --intervals` on "
        f"{args.num_samples:,} samples of each.\n\n    {command}\n\n"
        f"Processor: {device_name('cpu')}, threads: {args.threads}. Seconds are of the training "
        "steps, with whatever else the machine did; `bench/train_step.py` compares speed.\n"
    ]
    for name in dict.fromkeys(r["data"] for r in rows):
        for kind, title in (("base", "base models"), ("lora", "LoRAs of the inverted style")):
            chosen = [r for r in rows if (r["data"], r["kind"]) == (name, kind)]
            floors = [sum(r[key] for r in chosen) / len(chosen) for key in ("frechet_floor", "frechet_floor_balanced")]
            columns = {k: v for k, v in COLUMNS.items() if chosen[0].get(k) is not None}
            sides = {s: [r for r in chosen if r["side"] == s] for s in dict.fromkeys(r["side"] for r in chosen)}
            means = [
                [side, f"{of[0]['parameters']:,}", over_seeds(of, "seconds"), *(over_seeds(of, k) for k in columns)]
                for side, of in sides.items()
            ]
            real = [f"{sum(r[REAL[k]] for r in chosen) / len(chosen):.3g}" if REAL.get(k) in chosen[0] else "" for k in columns]
            means.append(["real images", "", "", *real])
            each = [[r["side"], r["seed"], *(with_interval(r, k) for k in columns)] for r in chosen]
            steps = chosen[0]["budget"]["steps"][kind == "lora"]
            parts += [
                f"\n## {name}: {title}\n\n{steps:,} steps. Means over seeds, and the least and the largest. Training images, "
                f"which the judge has seen, have a Frechet distance of {floors[0]:.2f} from the held-out ones, or "
                f"{floors[1]:.2f} where they are as many of each class as the samples.{OWN_LOSS * (kind == 'lora')}\n\n",
                table(["side", "parameters", "seconds", *columns.values()], means),
                "\nEach run, with intervals of 95%, not for the chance of the training (see the help of `evaluate.py`):\n\n",
                table(["side", "seed", *columns.values()], each),
            ]
    return "".join(parts)


def over_seeds(rows: Sequence[Row], key: str) -> str:
    values = [r[key] for r in rows]
    mean, low, high = (f"{significant(v, 3):g}" for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def with_interval(row: Row, key: str) -> str:
    bounds = row.get(f"{key}_interval")
    return f"{row[key]:.3f}" + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_dir", nargs="*", default=[], metavar="DIR", help="folders that torchvision's MNIST reads")
    add("--mnist", action="store_true", help="and MNIST as torchvision downloads it, with 60,000 images")
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each side, seeds 0 to N - 1 (3)")
    add("--mnist_seeds", type=positive_int, metavar="N", help="the same for each MNIST (default: --seeds)")
    add("--peer_learning_rate", type=float, nargs="+", default=[1e-4, 1e-3], metavar="R", help="theirs (1e-4 1e-3)")
    add("--num_training_steps", type=positive_int, metavar="N", help="of every training (default: the config's)")
    add("--num_samples", type=positive_int, default=1000, metavar="N", help="that are scored (1000)")
    add("--intervals", type=positive_int, default=1000, metavar="N", help="resamples of the bootstrap (1000)")
    add("--output_path", type=Path, default=OUTPUT_ROOT / "results", metavar="DIR", help="rows and weights")
    add("--markdown", type=Path, default=Path("docs/results.md"), metavar="FILE", help="default: docs/results.md")
    add("--threads", type=positive_int, default=2, metavar="N", help="CPU threads (2)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key of both configs; repeatable")
    args = parser.parse_args(argv)
    args.argv, args.device = list(sys.argv[1:] if argv is None else argv), "cpu"
    prepare(args)
    digits = setting_of(DIGITS, None, args)
    copies = [setting_of(MNIST, data_dir, args) for data_dir in (*args.data_dir, *[None] * args.mnist)]
    rows = rows_of(digits, args.seeds) + [row for copy in copies for row in rows_of(copy, args.mnist_seeds or args.seeds)]
    text = document(rows, args)
    write_text(args.markdown, text)
    print(args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
