"""Work with LoRA files of every format.

    lora inspect style.safetensors --plot style.png
    lora convert style.safetensors kohya.safetensors --to kohya
    lora merge ink.safetensors:0.7 pop.safetensors:0.3 both.safetensors --method svd --rank 8
    lora apply model.safetensors style.safetensors:0.8 styled.safetensors
    lora extract tuned.safetensors model.safetensors style.safetensors --energy 0.99
    lora resize style.safetensors small.safetensors --rank 2

Memory beyond that of Python and torch: inspect, convert, merge and resize hold the LoRA files that they read, the one
that they write, and one layer's factors in float64 (Stable Diffusion 1.5, rank 4: under 30 MB). apply holds the LoRA and
three times the largest tensor of BASE, which is read and written tensor by tensor (a UNet of 1.7 GB: under 100 MB for
linear layers, by its size 350 MB if the largest convolution is changed). extract holds the LoRA that it finds and eight
times the largest difference (under 1 GB).

OUT replaces a file of that name, but none that the command reads; that of merge only with --overwrite, since OUT may have
been forgotten.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xdiffusion.cli import Parser, number_type, positive_int, run

CONVERTED = "native, kohya, diffusers, diffusers-sd15, peft (a folder), cloneofsimo, cloneofsimo-pt, positional"
BASE_HELP = (
    "the model that the LoRA is for, where the file does not name its layers, or the format needs the names of all: "
    "sd15, sd21, or a YAML of this project"
)
WEIGHT = re.compile(r":[-+.\d][-+.\de]*$")  # of FILE:WEIGHT
share = number_type(float, lambda number: 0 < number <= 1, "a share in (0, 1]")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="lora")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(handler: Callable[[argparse.Namespace], None], description: str) -> argparse.ArgumentParser:
        name = handler.__name__.removeprefix("_")
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(handler=handler)
        return added

    _add_inspect(command(_inspect, "tell what a LoRA file holds, and how strong it is"))
    _add_convert(command(_convert, "write a LoRA in another format, with the same updates"))
    _add_merge(command(_merge, "add LoRAs with weights into one, and tell each layer's error"))
    _add_apply(command(_apply, "fold a LoRA into a checkpoint of this project; the result is a model that sample.py takes"))
    _add_extract(command(_extract, "distil the difference of two models of one architecture into a LoRA"))
    _add_resize(command(_resize, "cut a LoRA to a smaller rank, by SVD of its updates"))
    return parser.parse_args(argv)


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    inspect.add_argument("--plot", metavar="PNG", help="also draw |delta| of each block")
    inspect.add_argument("--json", action="store_true", help="print everything, module by module, as JSON")


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("input", metavar="IN")
    convert.add_argument("output", metavar="OUT")
    _add_output(convert, CONVERTED, converts=True)


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("inputs", nargs="+", metavar="FILE[:WEIGHT]", help="weight 1 if there is none")
    merge.add_argument("output", metavar="OUT")
    merge.add_argument(
        "--method",
        choices=("concat", "svd", "legacy"),
        default="concat",
        help="concat: exact, the ranks add up (default); svd: the nearest of --rank or --energy; legacy: adds the "
        "factors, as lora_add once did, which is not the sum of the updates",
    )
    merge.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    _add_size(merge)
    _add_output(merge, "format of OUT (default: that of the first FILE)")


def _add_apply(apply: argparse.ArgumentParser) -> None:
    apply.add_argument("model", metavar="BASE")
    apply.add_argument("lora", metavar="LORA[:SCALE]")
    apply.add_argument("output", metavar="OUT")
    apply.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    apply.add_argument("--allow_other_base", action="store_true", help="although it was trained on another base")


def _add_extract(extract: argparse.ArgumentParser) -> None:
    extract.add_argument("tuned", metavar="TUNED")
    extract.add_argument("model", metavar="BASE")
    extract.add_argument("output", metavar="OUT")
    _add_size(extract.add_mutually_exclusive_group(required=True))
    _add_output(extract, "format of OUT (default: native)")


def _add_resize(resize: argparse.ArgumentParser) -> None:
    resize.add_argument("input", metavar="IN")
    resize.add_argument("output", metavar="OUT")
    _add_size(resize.add_mutually_exclusive_group(required=True))
    _add_output(resize, "format of OUT (default: that of IN)")


def _add_size(added: argparse._ActionsContainer) -> None:
    added.add_argument("--rank", type=positive_int, metavar="R", help="of every layer")
    added.add_argument(
        "--energy", type=share, metavar="E", help="share of the sum of squared singular values that each layer keeps"
    )


def _add_output(added: argparse.ArgumentParser, to_help: str, *, converts: bool = False) -> None:
    of_dtype = "default: as it is" if converts else "of OUT (default: float32, of which all printed errors are)"
    added.add_argument("--to", required=converts, metavar="FORMAT", help=to_help)
    added.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    added.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=of_dtype)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if "output" in args:
        check_output(args)
    args.handler(args)


def command() -> int:
    """The console script `lora`."""
    return run(main)


def check_output(args: argparse.Namespace) -> None:
    """See that OUT is meant as such, for what is there under its name will be gone.

    Raises:
        ValueError: if it is a file that is read, or may be the last FILE of a merge without OUT.
    """
    from xdiffusion.checkpoints.paths import refuse_overwriting
    from xdiffusion.commands.lora_files import with_files_beside
    from xdiffusion.lora.weights import parse_lora_spec

    given, output = vars(args), Path(args.output)
    specs = [*given.get("inputs", []), *([args.lora] if "lora" in given else [])]
    read = [parse_lora_spec(spec)[0] for spec in specs]
    read += [Path(given[name]) for name in ("input", "model", "tuned") if name in given]
    refuse_overwriting(read, output)
    if len(read) > 1:  # of one, what stands beside it is written as it is
        for beside in with_files_beside(output)[1:]:
            refuse_overwriting([path for one in read for path in with_files_beside(one)], beside)
    if "inputs" not in given:
        return
    if WEIGHT.search(args.output):
        raise ValueError(f"OUT is missing? the last name is that of the file to write; {output} is a FILE to merge")
    for there in with_files_beside(output):
        if there.exists() and not args.overwrite:
            raise ValueError(f"OUT is missing? {there} is there already; --overwrite replaces it")


def _inspect(args: argparse.Namespace) -> None:
    from xdiffusion.checkpoints.paths import refuse_overwriting
    from xdiffusion.commands.lora_files import layer_table, read
    from xdiffusion.commands.report import draw, summary, text

    if args.plot:
        refuse_overwriting([Path(args.file)], Path(args.plot))
    lora = read(args.file, layer_table(args.base))
    facts = summary(lora)
    plain = json.loads(json.dumps(facts), parse_constant=lambda _: None)  # JSON has no word for NaN
    print(json.dumps(plain, indent=1) if args.json else text(facts))
    if args.plot:
        draw(facts, Path(args.plot), title=Path(args.file).name)


def _convert(args: argparse.Namespace) -> None:
    from xdiffusion.commands.lora_files import layer_table, read, write

    names = layer_table(args.base)
    write(read(args.input, names), args.output, args.to, names, args.dtype)


def _merge(args: argparse.Namespace) -> None:
    from xdiffusion.commands.lora_files import layer_table, merge_and_write, read
    from xdiffusion.lora.weights import parse_lora_spec

    names = layer_table(args.base)
    specs = [parse_lora_spec(spec) for spec in args.inputs]
    parts = [(read(path, names), weight) for path, weight in specs]
    size = {"rank": args.rank, "energy": args.energy}
    merge_and_write(parts, args.output, names, args.method, **size, format=args.to, dtype=args.dtype)


def _resize(args: argparse.Namespace) -> None:
    from xdiffusion.commands.lora_files import layer_table, merge_and_write, read

    names = layer_table(args.base)
    size = {"rank": args.rank, "energy": args.energy}
    parts = [(read(args.input, names), 1.0)]
    merge_and_write(parts, args.output, names, "svd", **size, format=args.to, dtype=args.dtype)


def _apply(args: argparse.Namespace) -> None:
    from xdiffusion.commands.base_weights import open_base
    from xdiffusion.commands.folding import fold_as_it_is
    from xdiffusion.commands.lora_files import layer_table, read
    from xdiffusion.lora.weights import parse_lora_spec

    base = open_base(Path(args.model))
    if not base.ours:
        raise ValueError(f"{args.model} is no checkpoint of this project; lora_add --mode upl takes diffusers' models")
    path, scale = parse_lora_spec(args.lora)
    lora = read(path, layer_table(args.base))
    fold_as_it_is(base, lora, scale, Path(args.output), allow_other_base=args.allow_other_base)


def _extract(args: argparse.Namespace) -> None:
    from xdiffusion.checkpoints.component_names import exchange_name
    from xdiffusion.checkpoints.hashes import content_hash
    from xdiffusion.checkpoints.lora_file import LoRAFile
    from xdiffusion.commands.base_weights import config_and_words, open_base, weight_differences
    from xdiffusion.commands.lora_files import layer_table, progress, write
    from xdiffusion.commands.report import text_table
    from xdiffusion.lora.base_identity import sample_of
    from xdiffusion.lora.merge import extract_factors, with_one_alpha

    names = layer_table(args.base)
    tuned, base = open_base(Path(args.tuned)), open_base(Path(args.model))
    layers = base.layers()
    modules, rows, left_out = {}, [], []
    for name, delta in weight_differences(tuned, base, progress("layers")):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and exchange_name(module) in layers and not name.startswith("autoencoder."):
            module = module if base.ours else exchange_name(module)
            modules[module], discarded = extract_factors(delta, rank=args.rank, energy=args.energy)
            rows.append((module, modules[module].rank, f"{discarded:.2e}"))
        else:
            left_out.append(name)
    if not modules:
        raise ValueError(f"{args.tuned} and {args.model} differ in no layer that a LoRA could change")
    print(text_table(("layer", "rank", "discarded energy"), rows))
    if left_out:
        print(
            f"{len(left_out)} tensors differ that no LoRA changes (biases, norms, the autoencoder, ...), such as {left_out[0]}"
        )
    base_hash = content_hash(base.files[0]) if base.ours else None
    sample = sample_of({name: base.files[0][f"{name}.weight"] for name in modules}) if base.ours else {}
    modules = with_one_alpha(modules)
    config, words = config_and_words(tuned)
    lora = LoRAFile(modules, tokens=words, base_hash=base_hash, base_sample=sample, config=config)
    write(lora, args.output, args.to or "native", names, args.dtype)


if __name__ == "__main__":
    sys.exit(command())
