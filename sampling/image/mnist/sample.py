"""The sampling command under the name that the MNIST lessons use; the same as sampling/image/sample.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "sample.py"), run_name="__main__")
