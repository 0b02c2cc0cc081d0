"""Work with Stable Diffusion's model files.

    sd convert v1-5-pruned-emaonly.safetensors sd15 --to diffusers
    sd convert sd15 sd15.safetensors --to original --dtype float16
    sd convert v2-1_768-ema-pruned.ckpt sd21.safetensors --to native

IN is an original single file (.safetensors, .ckpt), a folder of diffusers, or a model of this project; its shapes tell
which model it is. Memory beyond that of Python and torch: the tensors that --dtype changes, for a .ckpt all; others are mapped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import Parser, add_ema_flag, run

LAYOUTS = ("original", "diffusers", "native")
DTYPES = ("float32", "float16", "bfloat16")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="sd")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    description = "write a model in another layout, with the same weights"
    convert = commands.add_parser("convert", help=description, description=description)
    convert.set_defaults(handler=_convert)
    add = convert.add_argument
    add("input", metavar="IN")
    add("output", metavar="OUT", help="a file (.safetensors; original also .ckpt), or a new folder for diffusers")
    add("--to", required=True, choices=LAYOUTS, help="layout of OUT")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    add_ema_flag(convert)
    add("--config_path", metavar="YAML", help="of IN, where its shapes or its name do not tell, or tell it wrong")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.handler(args)


def command() -> int:
    """The console script `sd`."""
    return run(main)


def _convert(args: argparse.Namespace) -> None:
    import torch

    from xdiffusion.checkpoints.native import load_model_file
    from xdiffusion.checkpoints.paths import refuse_overwriting, weights_file
    from xdiffusion.commands.folding import write_with_words
    from xdiffusion.commands.sd_files import write_model
    from xdiffusion.loading import check_weights_fit, config_of

    refuse_overwriting([Path(args.input)], Path(args.output))
    file = load_model_file(weights_file(args.input), args.ema)
    config = config_of(file, args.config_path)
    check_weights_fit(file, config)
    if args.dtype:
        for tensors in (file.tensors, file.stable_diffusion.unused if file.stable_diffusion else {}):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(getattr(torch, args.dtype))
                if tensor.is_floating_point() and tensors[name].isinf().any() and not tensor.isinf().any():
                    largest = f"{name} has numbers of up to {tensor.abs().max():.3g}"
                    raise ValueError(f"{file.path}: {largest}, too large for --dtype {args.dtype}; take bfloat16 or float32")

    def write() -> str:
        write_model(file, config, Path(args.output), args.to)
        return f"{args.output}: {len(file.tensors)} tensors, {args.to}, from {file.path}"

    write_with_words(file.path, [(file.path, file.words)], Path(args.output), write)


if __name__ == "__main__":
    sys.exit(command())
