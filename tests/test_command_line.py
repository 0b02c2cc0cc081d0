"""What the commands share: flags that beat the config, errors of one line, exit statuses, a terminal that is not commanded."""

import argparse
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT

from xdiffusion import cli
from xdiffusion.build import load_config


def test_flags_beat_set_and_keep_their_type():
    """YAML would read `no` as false, 2024 as a number, and what follows # as a comment."""
    keys = {"precision": "training.mixed_precision", "data_dir": "data.data_dir", "compile": "training.compile"}
    args = argparse.Namespace(precision="no", data_dir="2024", compile=False, set=["training.mixed_precision=fp16"])
    digits = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
    config = load_config(digits, [*cli.overrides_from_flags(args, keys), "data.kind=image/mnist"])
    assert (config.training.mixed_precision, config.data.data_dir, config.training.compile) == ("no", "2024", False)
    args.data_dir = "my data # [old"
    config = load_config(digits, [*cli.overrides_from_flags(args, keys), "data.kind=image/mnist"])
    assert config.data.data_dir == "my data # [old"
    args = argparse.Namespace(precision=None, data_dir=None, compile=None, set=["a=1"])
    assert cli.overrides_from_flags(args, keys) == ["a=1"]


def test_a_flag_that_is_repeated_sets_a_list_of_texts():
    keys, prompts = (
        {"sample_prompt": "training.sample_prompts"},
        ["no", "3", "a, [b]: {c} # \U0001f98a é 'q' \"", "~/x"],
    )
    args = argparse.Namespace(sample_prompt=prompts, set=["training.sample_prompts=[a, b]"])
    config = load_config(ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml", cli.overrides_from_flags(args, keys))
    assert config.training.sample_prompts == prompts
    with (
        pytest.raises(ValueError, match=r"^--sample_prompt: training.sample_prompts is wrong"),
        cli.naming_flags(args, keys),
    ):
        raise ValueError("training.sample_prompts is wrong")


def test_a_users_mistake_is_one_line_and_status_2(capsys, monkeypatch):
    def mistaken(argv):
        raise ValueError("first\n  second")

    monkeypatch.delenv("XDIFFUSION_TRACEBACK", raising=False)
    assert cli.run(mistaken) == 2
    assert capsys.readouterr() == ("", "error: first second\n")
    monkeypatch.setenv("XDIFFUSION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="first"):
        cli.run(mistaken)


def test_an_error_with_a_name_without_end_is_cut(capsys):
    def main(argv):
        raise ValueError("a.json names\n" + "x " * 10**6 + "x" * 10**6)

    assert cli.run(main) == 2
    assert len(capsys.readouterr().err) <= cli.LONGEST_ERROR + 10


def test_what_the_system_refuses_is_a_users_mistake_too(capsys):
    assert cli.run(lambda argv: Path("x" * 5000).is_file() or Path("x" * 5000).read_text()) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 36] File name too long: ")


PRINTS = "import sys; print('\\x1b[2J\\x9b1m\\tß\\r'); raise ValueError('\\x1b]0;x\\x07')"


def test_names_in_files_cannot_command_a_terminal():
    """They are kept where a program reads the output."""
    code = f"from xdiffusion.cli import run; run(lambda argv: exec({PRINTS!r}))"
    outer, inner = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=inner, stderr=inner, timeout=60)
    os.close(inner)
    assert os.read(outer, 1000).decode() == "?[2J?1m\tß\r\r\nerror: ?]0;x?\r\n"
    os.close(outer)
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert piped.stdout.decode() == "\x1b[2J\x9b1m\tß\r\n" and piped.stderr == b"error: ?]0;x?\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_stops_a_called_script_stops_its_caller(number, tmp_path, capsys):
    (tmp_path / "stopped.py").write_text(f"def main(words): return {128 + number}")
    assert cli.run(lambda argv: cli.call_script(tmp_path / "stopped.py")) == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}\n"


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    assert cli.run(stopped) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def full_cpu(argv):
    torch.empty(2**50)


def full_gpu(argv):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n  GPU 0 has")


def full_before_torch_has_any(argv):
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported, allocate less")


@pytest.mark.parametrize("main", [full_cpu, full_gpu, full_before_torch_has_any])
def test_a_full_memory_is_one_line_that_says_where_to_read_on(main, capsys):
    assert cli.run(main) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and "allocate" in line
    document, heading = re.search(r"(docs/\S+\.md), (\w+)", line).groups()
    assert f"## {heading}\n" in (ROOT / document).read_text()


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.run(lambda argv: (_ for _ in ()).throw(RuntimeError("a mistake")))
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0)


def test_the_exit_status_is_that_of_main():
    assert (cli.run(lambda argv: None), cli.run(lambda argv: 1)) == (0, 1)


def test_a_reader_that_has_had_enough_is_no_error():
    code = "from xdiffusion.cli import run; import sys; sys.exit(run(lambda argv: print('line\\n' * 100_000)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=30), process.stderr.read()) == (0, b"")
