"""Which rank, which layers, which variant? Train a LoRA for each combination on one budget, score it, and draw it all.

    python training/image/ablate_lora.py --checkpoint P --ranks 1 2 4 8 --targets attention config
    python training/image/ablate_lora.py --checkpoint P --ranks 8 --variants lora rslora dora lora+ --seed 0 1

A combination is one run of training/image/train.py and one of sampling/image/evaluate.py. What comes out is a line of
results.jsonl in the output folder; a combination that is there, on the same base and budget, is not run again. So a
command that was stopped is simply repeated, and another one adds to it. Written of all that is there on this budget:

table.md, ablation.png      gap_closed, prompt accuracy, bytes, seconds of the training steps (on this machine)
spectra.md, singular_values.png, subspaces.png      the subspaces that the plain LoRAs learned ([LoRA] section 7)
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdiffusion.cli import REPOSITORY, Parser, call_script, positive_int, run, two_or_more
from xdiffusion.places import OUTPUT_ROOT

CONFIG = REPOSITORY / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
LORA_PLUS_RATIO = 4
VARIANTS = ("lora", "rslora", "dora", "lora+")
SCORES = {"gap_closed": "gap closed", "prompt_accuracy": "prompt accuracy", "bytes": "bytes", "seconds": "seconds"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="the base, a model of training/image/train.py")
    add("--config_path", default=CONFIG, metavar="YAML", help="of the base; its section lora: is the recipe (digits)")
    add("--dataset_name", default="image/digits_inverted", metavar="NAME", help="the style (image/digits_inverted)")
    add("--output_path", type=Path, default=OUTPUT_ROOT / "ablation", metavar="DIR", help="default: output/ablation")
    add("--ranks", type=positive_int, nargs="+", default=[1, 2, 4, 8], metavar="R", help="1 2 4 8")
    add(
        "--targets",
        nargs="+",
        default=["attention", "config"],
        metavar="T",
        help="presets, lists of name endings such as '[to_q, to_v]', or regular expressions that match whole names such as "
        "'.*\\.to_q'; config: what the config says (attention config)",
    )
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["lora"],
        metavar="V",
        help=f"of {', '.join(VARIANTS)} (lora); all with the config's alpha. lora+: the learning rate of B is "
        f"{LORA_PLUS_RATIO} times that of A, and their geometric mean is the config's",
    )
    add("--num_training_steps", type=positive_int, metavar="N", help="of each run (default: the config's)")
    add("--num_samples", type=two_or_more, default=300, metavar="N", help="samples that are scored (300)")
    add("--seed", type=int, nargs="+", default=[0], metavar="N", help="of the runs; several: each combination again (0)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a key of the runs' config, part of the budget; repeatable",
    )
    parser.settable = ""
    args = parser.parse_args(argv)
    own = {"training.seed": "--seed", "lora.rank": "--ranks"}
    if "config" not in args.targets:
        own["lora.target_modules"] = "--targets"
    for key in (assigned.partition("=")[0] for assigned in args.set):
        if key in own:
            raise ValueError(f"--set {key}: it has a flag here, {own[key]}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from omegaconf import OmegaConf

    from xdiffusion.build import INVERTED, build_model, load_config, override
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.checkpoints.writing import write_text
    from xdiffusion.training.trainable import make_trainable

    if not args.dataset_name.endswith(INVERTED):
        raise ValueError(f"--dataset_name {args.dataset_name}: the gap is measured on an inverted set, image/<name>{INVERTED}")
    config = load_config(args.config_path, args.set, True)
    steps = args.num_training_steps or config.training.num_training_steps
    weights = load_model_file(args.checkpoint).tensors
    budget = {
        "base": content_hash(weights),
        "config": hashlib.blake2b(OmegaConf.to_yaml(config).encode(), digest_size=8).hexdigest(),
        "dataset": args.dataset_name,
        "num_training_steps": steps,
        "num_samples": args.num_samples,
        "set": args.set,
    }
    record = args.output_path / "results.jsonl"
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    if any(result["budget"] != budget for result in results):
        raise ValueError(f"{record} holds runs on another base, config or budget; name another folder with --output_path")
    # ranks change slowest, so that a stopped command has something of every target
    combinations = itertools.product(args.ranks, args.targets, args.variants, args.seed)
    named = (dict(zip(("rank", "target", "variant", "seed"), values)) for values in combinations)
    missing = [new for new in named if not any(new.items() <= result.items() for result in results)]
    for combination in missing:  # what cannot be trained is said before the first of them is
        changed = override(config, settings(combination, config), "command line")
        make_trainable(build_model(changed, without_weights=True), changed, lora=True)
    for combination in missing:
        results.append(combination | train_and_score(args, combination, config, steps) | {"budget": budget})
        write_text(record, "".join(json.dumps(result) + "\n" for result in results))
    results.sort(key=lambda r: (r["target"], VARIANTS.index(r["variant"]), r["rank"], r["seed"]))
    write_report(args.output_path, results)
    write_spectra(args.output_path, results, weights)


def train_and_score(
    args: argparse.Namespace, combination: Mapping[str, Any], config: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """Run the two commands; returns the scores, the file and its bytes, and the seconds of the training steps."""
    from xdiffusion.training.records import read_metrics

    target = re.sub(r"\W+", "-", combination["target"]).strip("-")[:80]
    if target != combination["target"]:  # of a list or an expression: no characters that a shell reads, and two are not one
        target += f"-{hashlib.blake2b(combination['target'].encode(), digest_size=3).hexdigest()}"
    folder = args.output_path / f"{target}-{combination['variant']}-rank{combination['rank']}-seed{combination['seed']}"
    lora = folder / f"diffusion-{steps}-lora.safetensors"
    call_script(
        "training/image/train.py",
        *("--config_path", args.config_path, "--dataset_name", args.dataset_name, "--output_path", folder),
        *("--use_lora_training", "--load_model_weights_from_checkpoint", args.checkpoint),
        *("--num_training_steps", steps, "--save_and_sample_every_n", steps, "--seed", combination["seed"]),
        *(word for key in [*args.set, *settings(combination, config)] for word in ("--set", key)),
    )
    scored = call_script(
        "sampling/image/evaluate.py",
        *("--checkpoint", args.checkpoint, "--lora_path", lora, "--dataset_name", args.dataset_name),
        *("--num_samples", args.num_samples, "--json"),
        *(word for key in args.set if key.startswith("sampling.") for word in ("--set", key)),
    )
    scores = json.loads(scored)
    seconds = sum(config.training.batch_size / m["images_per_second"] for m in read_metrics(folder / "metrics.jsonl"))
    kept = ("gap_closed", "prompt_accuracy", "frechet_distance", "frechet_floor", "background")
    measured = {"bytes": lora.stat().st_size, "seconds": round(seconds, 1), "file": str(lora)}
    return {key: scores[key] for key in kept} | measured


def settings(combination: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What a combination changes in the config, as KEY=VALUE."""
    from xdiffusion.config_files import assignment

    rate = config.optimizer.learning_rate / math.sqrt(LORA_PLUS_RATIO)
    of_variant = {
        "lora": [],
        "rslora": ["lora.use_rslora=true"],
        "dora": ["lora.use_dora=true"],
        "lora+": [f"optimizer.lora_plus_ratio={LORA_PLUS_RATIO}", f"optimizer.learning_rate={rate}"],
    }
    target = combination["target"]
    listed = re.fullmatch(r"\[[\w., ]*\]", target)  # as YAML has it, and --set
    value = f"lora.target_modules={target}" if listed else assignment("lora.target_modules", target)
    of_target = [] if target == "config" else [value]
    return [f"lora.rank={combination['rank']}", *of_target, *of_variant[combination["variant"]]]


# --- the table and the plot of scores ---


def write_report(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """table.md, which is printed too, and ablation.png: each score against the rank, the mean over seeds."""
    heads = ["targets", "variant", "rank", "seed", *SCORES.values()]
    rows = [
        [
            *(r[key] for key in ("target", "variant", "rank", "seed")),
            *(f"{r['gap_closed']:.3f}", f"{r['prompt_accuracy']:.3f}", f"{r['bytes']:,}", f"{r['seconds']:.0f}"),
        ]
        for r in results
    ]
    write_table(folder / "table.md", heads, rows)

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    lines: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for r in results:
        label = r["target"] if r["variant"] == "lora" else f"{r['target']}, {r['variant']}"
        lines.setdefault(label, {}).setdefault(r["rank"], []).append(r)
    for axes, (score, label) in zip(figure.subplots(2, 2).flat, SCORES.items()):
        for name, by_rank in lines.items():
            means = [sum(r[score] for r in same) / len(same) for same in by_rank.values()]
            axes.plot(list(by_rank), means, marker="o", label=textwrap.fill(name, 40))
        ranks = sorted({r["rank"] for r in results})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, ranks)
        axes.set(xlabel="rank", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(folder / "ablation.png", dpi=100)


def write_table(path: Path, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a markdown table and print it."""
    from xdiffusion.checkpoints.writing import write_text

    lines = [heads, ["---"] * len(heads), *rows]
    text = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    write_text(path, text)
    print(f"\n{path}\n{text}")


# --- the subspaces ---


def write_spectra(folder: Path, results: Sequence[Mapping[str, Any]], weights: Mapping[str, Any]) -> None:
    """spectra.md, singular_values.png and subspaces.png of the plain LoRAs; all are means or medians over layers."""
    from xdiffusion.checkpoints.lora_formats import read_lora

    loras = {(r["target"], r["rank"], r["seed"]): read_lora(Path(r["file"])).modules for r in results if r["variant"] == "lora"}
    if loras:
        heads = ["targets", "rank", "seed", "layers", "delta / W", "first value's energy"]
        heads += ["W in delta / W", "in random / W", "in W's top / W", "amplification"]
        rows = [[*key, len(modules), *spectrum_row(modules, weights)] for key, modules in loras.items()]
        write_table(folder / "spectra.md", heads, rows)
        draw_singular_values(folder / "singular_values.png", loras)
        draw_subspaces(folder / "subspaces.png", loras)


def spectrum_row(modules: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    """Medians over layers: Frobenius norms over that of W, the share of S_1^2, and the amplification factor."""
    from statistics import median

    from xdiffusion.lora.adapter_spectra import amplification

    found = [amplification(weights[f"{n}.weight"].flatten(1), *matrices(f)) for n, f in modules.items()]
    shares = [float(s[0] ** 2 / s.square().sum()) for s in map(singular_values, modules.values())]
    return [
        f"{median(a.delta / a.weight for a in found):.2f}",
        f"{median(shares):.2f}",
        *(f"{median(getattr(a, which) / a.weight for a in found):.3f}" for which in ("in_delta", "in_random", "in_top")),
        f"{median(a.factor for a in found):.1f}",
    ]


def matrices(factors: Any) -> tuple[Any, Any, float]:
    """B (out, rank), A (rank, in * kernel), scaling."""
    return factors.lora_B.flatten(1), factors.lora_A.flatten(1), factors.scaling


def singular_values(factors: Any) -> Any:
    """Of scaling * B A."""
    from xdiffusion.lora.adapter_spectra import delta_singular_values

    return delta_singular_values(*matrices(factors))


def draw_singular_values(path: Path, loras: Mapping[tuple[str, int, int], Mapping[str, Any]]) -> None:
    """A panel for each target: the median over layers for each rank, and every layer of the largest in grey."""
    from statistics import median

    from matplotlib.figure import Figure

    targets = sorted({target for target, _, _ in loras})
    figure = Figure(figsize=(4.5 * len(targets), 3.6), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), sharey=True, squeeze=False).flat, targets):
        of_rank = {rank: modules for (t, rank, _), modules in reversed(loras.items()) if t == target}
        for rank, modules in of_rank.items():
            values = [singular_values(factors).tolist() for factors in modules.values()]
            if rank == max(of_rank):
                for layer in values:
                    axes.plot(range(1, len(layer) + 1), layer, color="0.85", linewidth=0.7, zorder=0)
            longest = range(max(map(len, values)))
            medians = [median(layer[i] for layer in values if i < len(layer)) for i in longest]
            axes.plot([i + 1 for i in longest], medians, marker="o", label=f"rank {rank}")
        axes.set(title=target, xlabel="index", ylabel="singular value of delta", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def draw_subspaces(path: Path, loras: Mapping[tuple[str, int, int], Mapping[str, Any]]) -> None:
    """similarity(i, j) of A_1 and A_2, mean over layers, a row for each target that has two LoRAs; nothing, where none has.

    A_2 is of the largest rank and the first seed, A_1 of the next smaller rank, of another seed, and random.
    """
    from matplotlib.figure import Figure

    runs = Counter(target for target, _, _ in loras)
    targets = sorted(target for target, count in runs.items() if count > 1)
    if not targets:
        return
    figure = Figure(figsize=(10, 3.2 * len(targets)), layout="constrained")
    panels = figure.subplots(len(targets), 3, squeeze=False)
    for row, target in zip(panels, targets):
        *_, small, rank = [0, *sorted({rank for t, rank, _ in loras if t == target})]
        seeds = sorted(seed for t, r, seed in loras if (t, r) == (target, rank))
        largest, by_rank, by_seed = (
            [factors.lora_A.flatten(1) for factors in loras.get((target, *key), {}).values()]
            for key in ((rank, seeds[0]), (small, seeds[0]), (rank, seeds[-1]))
        )
        labels = f"rank {small}", f"seed {seeds[-1]}" * (len(seeds) > 1), "random"
        for axes, label, other in zip(row, labels, (by_rank, by_seed, random_like(largest))):
            if not (label and other):
                axes.set_axis_off()
                continue
            means = mean_similarity(other, largest)
            extent = (0.5, means.shape[1] + 0.5, 0.5, means.shape[0] + 0.5)
            image = axes.imshow(means, vmin=0, vmax=1, cmap="magma", origin="lower", extent=extent)
            axes.set(title=target, xlabel=f"j, rank {rank} seed {seeds[0]}", ylabel=f"i, {label}")
    figure.colorbar(image, ax=panels, label="similarity(i, j)")
    figure.savefig(path, dpi=100)


def random_like(matrices: Sequence[Any]) -> list[Any]:
    """Standard normal matrices of these shapes, from one generator: those of equal shapes differ."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(A.shape, generator=generator) for A in matrices]


def mean_similarity(first: Sequence[Any], second: Sequence[Any]) -> Any:
    """The mean over layers of similarity, (rank of the first, rank of the second); layers with fewer inputs are left out."""
    import torch

    from xdiffusion.lora.adapter_spectra import subspace_similarity

    tables = [subspace_similarity(A, B) for A, B in zip(first, second) if max(len(A), len(B)) <= A.shape[1]]
    return torch.stack(tables).mean(0)


if __name__ == "__main__":
    sys.exit(run(main, lasting=True))
