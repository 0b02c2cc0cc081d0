"""The sampling command under the name that the MNIST lessons use; the same as sampling/image/sample.py."""

import runpy
import sys
from pathlib import Path

from xdiffusion.cli import run

main = runpy.run_path(str(Path(__file__).resolve().parents[1] / "sample.py"))["main"]

if __name__ == "__main__":
    sys.exit(run(main))
