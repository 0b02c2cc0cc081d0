"""What an installed copy needs is in the wheel, and the repository holds what belongs to it alone."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import xdiffusion
from xdiffusion.loading import STABLE_DIFFUSION

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"


def test_a_wheel_holds_the_configs_by_which_files_are_recognised(tmp_path):
    pytest.importorskip("setuptools")
    for folder in ("xdiffusion", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-1000:]
    within = STABLE_DIFFUSION.relative_to(Path(xdiffusion.__file__).parents[1])
    (wheel,) = tmp_path.glob("wheel/*.whl")
    with ZipFile(wheel) as archive:
        packed = {Path(name).name for name in archive.namelist() if Path(name).parent == within}
    assert packed == {path.name for path in (ROOT / "configs/image/sd").glob("*.yaml")}
    assert "absent from the `packages`" not in built.stderr


def test_no_file_is_tracked_that_nobody_wrote():
    """A profiler's wheel of 3 MB once was: 1.2 MB are more than the film of lesson 01."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone: this is no git repository")
    paths = [ROOT / name for name in listed.stdout.split("\0")[:-1]]
    endings = {".py", ".md", ".yaml", ".yml", ".toml", ".in", ".css", ".png", ".svg", ".gif", ".npz", ""}
    assert {path.suffix for path in paths} <= endings
    assert max(path.stat().st_size for path in paths if path.is_file()) < 1.2e6
