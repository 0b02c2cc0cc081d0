"""The launch files of configs/accelerate: read by accelerate, and started with two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from commands import ROOT, TRAIN, run_script
from test_multiprocess import BOUND, curve, free_port
from test_resume import COMMON

from xdiffusion.training.run_record import read_run

LAUNCH_FILES = ROOT / "configs/accelerate"


@pytest.mark.parametrize("path", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_launch_files_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert config.num_processes == 8 * config.num_machines


def test_a_launch_file_starts_processes_that_share_a_batch(tmp_path):
    """As docs/scaling.md has it, but for fewer processes and --force_cpu."""
    words = [*COMMON, "--batch_size", 8, "--num_training_steps", 2, "--output_path"]
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", LAUNCH_FILES / "one_machine.yaml"]
    launch += ["--num_processes", 2, "--main_process_port", free_port(), ROOT / TRAIN, *words, tmp_path / "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, launch)], env=environment, capture_output=True, text=True, check=False, timeout=2 * BOUND)
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "two")["segments"][0]["processes"] == 2
    assert run_script(TRAIN, *words, tmp_path / "one") == 0
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
