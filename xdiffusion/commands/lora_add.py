r"""Add a LoRA to a model, or two LoRAs to one another.

    lora_add PATH_1 PATH_2 OUTPUT ALPHA
    lora_add --path_1 PATH --path_2 PATH --mode MODE --alpha ALPHA --output_path OUTPUT

upl          model + LoRA -> model:  W' = W + alpha * delta
             PATH_1: a checkpoint of this project, a folder of diffusers, or a UNet of diffusers (one safetensors file)
lpl          LoRA + LoRA -> LoRA:    delta = alpha * delta_1 + (1 - alpha) * delta_2
             exactly, by concatenation, so that the ranks add up; --rank cuts it, by SVD, to the nearest of that rank
ljl          LoRA + LoRA -> LoRA:    delta = delta_1 + delta_2, exactly; alpha does not count
upl-ckpt-v2  as upl, written as Stable Diffusion's original single file (.safetensors, .ckpt)
             PATH_1: Stable Diffusion 1.5 or 2.1: such a file, a folder of diffusers, or a model of this project
             both write the LoRA's learned words beside OUTPUT, in <its name>.ti.pt

delta = (lora_alpha / rank) B A is the update as trained. The original lora_add averaged the factors in place of the
updates: B = alpha B_1 + (1 - alpha) B_2, and A likewise, so that

    B A = alpha^2 delta_1 + (1 - alpha)^2 delta_2 + alpha (1 - alpha) (B_1 A_2 + B_2 A_1).

At alpha = 0.5 two unrelated LoRAs come out with a quarter of each update and a half-sized mixture that belongs to neither,
and the result depends on which of many equal factorisations a file happens to hold. Only alpha = 0, alpha = 1 and a LoRA
merged with itself come out right. --legacy gives that rule, to repeat old results; its error is printed.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import Parser, positive_int, run

NUMBER = re.compile(r"[-+\d.].*")
MODES = ("lpl", "upl", "ljl", "upl-ckpt-v2")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="lora_add", usage="lora_add [options] [PATH_1 PATH_2 OUTPUT [ALPHA [ALPHA_2] [MODE]]]")
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--path_1", metavar="PATH", help="the model (upl) or the first LoRA")
    add("--path_2", metavar="PATH", help="the LoRA, or the second one")
    add("--output_path", metavar="PATH", help="what to write; a LoRA ending in .pt is written as cloneofsimo's")
    add("--alpha", "--alpha_1", type=float, metavar="ALPHA", help="default 0.5")
    add("--alpha_2", type=float, metavar="ALPHA", help="lpl: of the second LoRA (default: 1 - ALPHA)")
    add("--mode", choices=MODES, help="default lpl")
    add("--rank", type=positive_int, metavar="R", help="lpl and ljl: cut the result to this rank by SVD")
    add("--legacy", action="store_true", help="lpl: add the factors, as the original did, in place of the updates")
    add(
        "--base",
        metavar="MODEL",
        help="whose layers a LoRA without names is for: sd15, sd21, or a YAML of this project",
    )
    add("--allow_other_base", action="store_true", help="upl: although the LoRA was trained on another base")
    args = parser.parse_args(argv)
    names = ["path_1", "path_2", "output_path", "alpha", "mode"]
    if len(args.words) > 4 and NUMBER.fullmatch(args.words[4]):  # cloneofsimo's later spelling
        names.insert(4, "alpha_2")
    for word, name in zip(args.words, names):
        if getattr(args, name) is not None:
            parser.error(f"{name} is given twice: {word!r} and --{name}")
        try:
            setattr(args, name, float(word) if name.startswith("alpha") else word)
        except ValueError:
            parser.error(f"ALPHA must be a number, not {word!r}")
    missing = [f"--{name}" for name in ("path_1", "path_2", "output_path") if getattr(args, name) is None]
    if missing or len(args.words) > len(names):
        parser.error(f"missing: {', '.join(missing)}" if missing else f"too many words: {args.words[len(names) :]}")
    args.alpha = 0.5 if args.alpha is None else args.alpha
    for alpha in (args.alpha, args.alpha_2 or 0.0):
        if not math.isfinite(alpha):
            parser.error(f"ALPHA must be a finite number, not {alpha}")
    args.mode = args.mode or "lpl"
    if args.mode not in MODES:
        parser.error(f"MODE must be one of {', '.join(MODES)}, not {args.mode!r}")
    if args.alpha_2 is not None and args.mode != "lpl":
        parser.error(f"ALPHA_2 is for lpl, the weighted sum of two LoRAs, not for {args.mode}")
    if args.legacy and (args.mode != "lpl" or args.rank):
        parser.error("--legacy is a rule of lpl, and knows no --rank")
    if args.rank and args.mode.startswith("upl"):
        parser.error("--rank cuts a LoRA; the result of upl is a model")
    if args.allow_other_base and not args.mode.startswith("upl"):
        parser.error(f"--allow_other_base is for upl and upl-ckpt-v2, which fold into a base, not for {args.mode}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from xdiffusion.checkpoints.paths import refuse_overwriting
    from xdiffusion.commands.base_weights import open_base
    from xdiffusion.commands.folding import fold_as_it_is, fold_into_original
    from xdiffusion.commands.lora_files import layer_table, merge_and_write, read, with_files_beside

    read_from = [path for given in (args.path_1, args.path_2) for path in with_files_beside(Path(given))]
    for path in with_files_beside(Path(args.output_path)):
        refuse_overwriting(read_from, path)
    names = layer_table(args.base)
    if args.mode.startswith("upl"):
        path, output = Path(args.path_1), Path(args.output_path)
        if not path.exists() and not path.with_suffix(".safetensors").exists():
            raise ValueError(f"no model at {path}; a model of the Hugging Face hub has to be downloaded first")
        lora = read(args.path_2, names)
        if args.mode == "upl":
            fold_as_it_is(open_base(path), lora, args.alpha, output, allow_other_base=args.allow_other_base)
        else:
            fold_into_original(path, lora, args.alpha, output, allow_other_base=args.allow_other_base)
        return
    first, second = read(args.path_1, names), read(args.path_2, names)
    second_alpha = 1 - args.alpha if args.alpha_2 is None else args.alpha_2
    weights = (args.alpha, second_alpha) if args.mode == "lpl" else (1.0, 1.0)
    method = "legacy" if args.legacy else "svd" if args.rank else "concat"
    merge_and_write(list(zip((first, second), weights)), args.output_path, names, method, rank=args.rank)


def command() -> int:
    """The console script `lora_add`."""
    return run(main)


if __name__ == "__main__":
    sys.exit(command())
