"""Compare runs: a table of what differs and what came of it, and their loss curves over each other.

python training/image/compare.py output/image/digits/a output/image/digits/b --output_path output/compare.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xdiffusion.cli import Parser, run
from xdiffusion.places import OUTPUT_ROOT


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders that training/image/train.py wrote")
    add(
        "--output_path",
        type=Path,
        default=OUTPUT_ROOT / "compare.png",
        metavar="PNG",
        help="default output/compare.png",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from xdiffusion.training.comparison import as_text, comparison_table, draw_curves, read_runs, remark

    runs = read_runs(args.runs)
    print(as_text(comparison_table(runs)))
    if note := remark(runs):
        print(note, file=sys.stderr)
    draw_curves(runs, args.output_path)
    print(args.output_path)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
