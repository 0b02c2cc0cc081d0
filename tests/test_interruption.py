"""What reaches a training from outside: a signal at its last picture, and the end of whoever reads its output."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, TRAIN, run_script, set_words
from test_resume import COMMON

from xdiffusion.training import text_encoder
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run


@pytest.mark.parametrize("streams", [{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, {"stdout": subprocess.PIPE}])
def test_a_run_outlives_the_reader_of_its_output(streams, tmp_path):
    """As in `train.py 2>&1 | tee log`, which Ctrl-C ends too: it writes its checkpoint and says what became of it."""
    words = [sys.executable, ROOT / TRAIN, *COMMON, "--num_training_steps", 10**6, "--output_path", tmp_path]
    with subprocess.Popen([*map(str, words)], **streams) as process:
        until = time.monotonic() + 60
        while len(list(read_metrics(tmp_path / "metrics.jsonl"))) < 3:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.stdout.close()
        time.sleep(0.5)  # it goes on meanwhile, and says so of each checkpoint
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    (segment,) = read_run(tmp_path)["segments"]
    assert segment["status"] == "interrupted" and segment["last_step"] > 3
    assert (tmp_path / f"diffusion-{segment['last_step']}.state.pt").is_file()


def test_a_run_whose_output_leads_nowhere_from_its_start(tmp_path):
    """Closed before Python began, as some daemons do, or a pipe that nobody reads."""
    words = [sys.executable, ROOT / TRAIN, *COMMON, "--num_training_steps", 1, "--output_path"]
    line = f"{shlex.join(map(str, words))} {{}} {{}}; exit ${{{{PIPESTATUS[0]}}}}"
    for name, outputs in (("closed", ">&-"), ("both", ">&- 2>&-"), ("unread", "2>&1 | true")):
        done = subprocess.run(["bash", "-c", line.format(tmp_path / name, outputs)], check=False, timeout=120)
        assert (done.returncode, (tmp_path / name / "diffusion-1.safetensors").is_file()) == (0, True), name


def test_a_run_outlives_its_terminal(tmp_path):
    """As one that was disowned before the window was closed."""
    words = [sys.executable, ROOT / TRAIN, *COMMON, "--num_training_steps", 40, "--output_path", tmp_path]
    outer, inner = pty.openpty()
    process = subprocess.Popen([*map(str, words)], stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    said = b""
    while b"step 4:" not in said:
        said += os.read(outer, 1000)
    os.close(outer)
    assert process.wait(timeout=60) == 0
    assert read_run(tmp_path)["segments"][0]["status"] == "finished"


def test_a_signal_at_the_last_picture_of_the_tiny_clip_stops_the_command(work_folder, monkeypatch, capfd):
    def draw(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*_)

    drawn = text_encoder.draw_similarities
    monkeypatch.setattr(text_encoder, "draw_similarities", draw)
    clip = ["clip.training.num_training_steps=2", "clip.training.batch_size=10", "clip.optimizer.warmup_steps=0"]
    words = [*COMMON, *set_words(["model.text_encoder.pretrained=tiny", *clip]), "--output_path", "run"]
    assert run_script(TRAIN, *words) == 143
    assert capfd.readouterr().err.splitlines()[-1] == "stopped by SIGTERM after step 2; the last"
    assert not list((work_folder / "run").glob("*.safetensors"))
