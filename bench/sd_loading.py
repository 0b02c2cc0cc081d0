"""Loading Stable Diffusion 1.5 from its original single file: time beside reading the bytes, and peak memory.

    python bench/sd_loading.py
    python bench/sd_loading.py --dtype float16 --suffix .ckpt --folder /tmp

A file of random weights of full size (4.3 GB in float32, written once to --folder) is loaded by `load_model` into the model,
and then touched, so that every byte of it has been read; theirs is a plain read of the file's bytes into memory. Each
measurement is in a process of its own that has imported everything before, with the file in the page cache. A float16 file
is loaded as float16, as by `sample.py --mixed_precision fp16`; the autoencoder is in float32 there too.

Peak memory is what the process grew by at most, files that it has mapped included, over the size of the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import Goal, Report, parser, peak_resident, prepare

from xdiffusion.cli import run

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the file, and of what it is loaded as")
    flags.add_argument("--suffix", choices=(".safetensors", ".ckpt"), default=".safetensors", help="of the file (.safetensors)")
    flags.add_argument("--model", default="sd15", metavar="NAME", help="built-in config, such as sd15_tiny (sd15)")
    flags.add_argument("--folder", metavar="DIR", help="where the file is written (a temporary folder)")
    flags.add_argument("--measure", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    flags.add_argument("--file", help=argparse.SUPPRESS)
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    prepare(args)
    if args.measure:
        print(json.dumps(measure(args.measure, Path(args.file), DTYPES[args.dtype])))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / f"model{args.suffix}"
        write_file(path, args.model, DTYPES[args.dtype])
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for i in range(1 + args.rounds):  # the first round fills the page cache
            for side in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
                found = in_a_process(side, path, args.threads, args.dtype)
                sides[side] += [found] if i else []
        size = path.stat().st_size
    report = Report(args)
    details = {"file_bytes": size, "dtype": args.dtype, "suffix": args.suffix}
    seconds = {side: [found["seconds"] for found in of_side] for side, of_side in sides.items()}
    report.add("load_seconds", **seconds, goal=Goal(1.2), **details)
    peaks = {side: [found["peak"] / size for found in of_side] for side, of_side in sides.items()}
    report.add("load_peak_over_file", **peaks, unit="file", goal=Goal(1.15, of="ours"), **details)
    report.finish()
    return 0


def write_file(path: Path, name: str, dtype: torch.dtype) -> None:
    """An original single file of a built-in model, with values that no format could leave out."""
    from xdiffusion.build import build_model, load_config
    from xdiffusion.checkpoints.stable_diffusion import to_original
    from xdiffusion.checkpoints.writing import save_safetensors
    from xdiffusion.loading import STABLE_DIFFUSION

    model = build_model(load_config(STABLE_DIFFUSION / f"{name}.yaml"), without_weights=True)
    named = to_original(model.state_dict(), "transformers" if name.startswith("sd15") else "open_clip")
    tensors = {n: torch.full(t.shape, 0.01, dtype=dtype) for n, t in named.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_safetensors(path, tensors, {"format": "pt"})


def in_a_process(side: str, path: Path, threads: int, dtype: str) -> dict[str, float]:
    """{"seconds", "peak"} of one side, measured in a process of its own."""
    words = ["--measure", side, "--file", str(path), "--threads", str(threads), "--dtype", dtype]
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"the measurement of {side} failed: {result.stderr[-500:]}")
    return json.loads(result.stdout)


def measure(side: str, path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and peak bytes of one call."""
    from xdiffusion.loading import load_model

    kept = []

    def ours() -> None:
        model, _ = load_model(path, dtype=dtype)
        for tensor in model.state_dict().values():
            stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            stored[::4096].sum()  # one byte of each page
        kept.append(model)

    started = time.perf_counter()
    peak = peak_resident(ours if side == "ours" else lambda: kept.append(path.read_bytes()))
    return {"seconds": time.perf_counter() - started, "peak": peak}


if __name__ == "__main__":
    sys.exit(run(main))
