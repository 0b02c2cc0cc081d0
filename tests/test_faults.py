"""What can go wrong during a run: kills, signals, full disks, lost files. The last good checkpoint is found and named."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from commands import ROOT, TRAIN, TRAIN_CLIP, run_script, set_words
from PIL import Image
from test_resume import COMMON, CONFIG, STEPS
from test_state import fresh

from xdiffusion import build
from xdiffusion.checkpoints import writing
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import save_pickled
from xdiffusion.data import digits
from xdiffusion.data.image_set import ImageSet
from xdiffusion.training import previews, state
from xdiffusion.training.loop import Trainer
from xdiffusion.training.records import Records
from xdiffusion.training.run_record import read_run
from xdiffusion.training.state import state_path


def test_killed_runs_lose_nothing_but_the_steps_since(monkeypatch, capfd):
    """The full figure: python bench/kill_runs.py --kills 200."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import kill_runs

    AcceleratorState._reset_state(reset_partial_state=True)
    assert kill_runs.main(["--kills", "12", "--steps", "4", "--seed", "1", "--json"]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["kills"] == 12 and figures["hit_a_write"] > 0
    assert (figures["lost_checkpoints"], figures["differing"], figures["failed"]) == (0, 0, 0)


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_after(tmp_path, monkeypatch):
    """Else a power failure could leave the name of the last good file on an empty one."""
    path, flush, flushed = tmp_path / "file", os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append((os.fstat(fd).st_ino, path.exists())) or flush(fd))
    writing.write_atomically(path, lambda temporary: temporary.write_text("content"))
    assert flushed == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_checkpoint_is_not_begun_before_the_last_one_is_written(tmp_path, monkeypatch):
    """Two threads would rotate each other's files; and what befell the last one is said first."""
    trainer, checkpoints = fresh(tmp_path)

    def slow_and_full(*_):
        time.sleep(0.1)
        raise CheckpointError("no space left")

    monkeypatch.setattr(state, "write_state", slow_and_full)
    checkpoints.save(trainer, 1)
    with pytest.raises(CheckpointError, match="no space left"):
        checkpoints.save(trainer, 2)
    assert not checkpoints.path(2).exists()


@pytest.mark.parametrize("script", [TRAIN, TRAIN_CLIP])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_one_line(script, number, tmp_path, monkeypatch, capfd):
    """Within the data's loading, as a key that is pressed there would be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background may have inherited none
    monkeypatch.setattr(digits, "_draw", lambda *_: signal.raise_signal(number), raising=True)
    file = tmp_path / "clip.safetensors"
    words = ["--config_path", CONFIG, *set_words(["model.text_encoder.pretrained=tiny", "data.image_size=12"])]
    assert run_script(script, *words, "--output_path", file if script == TRAIN_CLIP else tmp_path / "run") == 128 + number
    assert capfd.readouterr().err.splitlines() == [f"stopped by {number.name}"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not file.exists()


def test_a_sample_grid_that_is_not_finite_is_left_out_and_the_run_goes_on(tmp_path, capfd):
    too_strong = ["sampling.cfg_scale=1e39", "sampling.clip_x0=false"]
    assert run_script(TRAIN, *COMMON, *set_words(too_strong), "--output_path", tmp_path) == 0
    assert f"step {STEPS}: no samples: " in capfd.readouterr().out
    assert (tmp_path / f"diffusion-{STEPS}.safetensors").is_file()
    assert [path.name for path in tmp_path.rglob("*.png")] == ["loss.png"]
    assert read_run(tmp_path)["segments"][0]["status"] == "finished"


def test_a_process_lost_before_the_first_step(tmp_path, monkeypatch, capfd):
    def load(config):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    monkeypatch.setattr(build, "build_data", load)
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: before the first step, another process of this run is gone or cannot be reached")


def gone(*_, **__):
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")


def test_a_process_lost_while_the_run_goes_back(tmp_path, monkeypatch, capfd):
    def batch(*_):
        monkeypatch.setattr(Accelerator, "wait_for_everyone", gone)
        return SimpleNamespace(images=torch.full((4, 1, 12, 12), torch.nan), captions=[""] * 4)

    monkeypatch.setattr(ImageSet, "batch", batch)
    assert run_script(TRAIN, *COMMON, "--set", "training.rollbacks=1", "--output_path", tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: training stopped after step 0, another process of this run is gone")


def test_a_process_lost_in_the_picture_that_a_kill_left_out(tmp_path, monkeypatch, capfd):
    words = [*COMMON, "--num_training_steps", 2, "--output_path", tmp_path, "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 0
    (tmp_path / "samples/sample-2.png").unlink()
    monkeypatch.setattr(previews, "draw_sample_grid", gone)
    assert run_script(TRAIN, *words) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: training stopped after step 2, another process of this run is gone")


def test_a_base_that_is_replaced_in_place_does_not_change_the_run(tmp_path, monkeypatch):
    """`cp other.safetensors base.safetensors` writes into the file that was read."""
    base, step = tmp_path / "base/diffusion-1.safetensors", Trainer.step
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", base.parent) == 0

    def replaced(self, number):
        with base.open("r+b") as file:
            file.write(bytes(base.stat().st_size))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", replaced)
    words = [*COMMON, "--use_lora_training", "--load_model_weights_from_checkpoint", base, "--output_path", tmp_path / "run"]
    assert run_script(TRAIN, *words, "--set", "lora.target_modules=attention") == 0  # and its hash of the base is the same


def test_a_tiny_clip_that_diverges_writes_nothing(tmp_path, capfd):
    file = tmp_path / "clip.safetensors"
    tiny = ["clip.optimizer.learning_rate=1e30", "data.image_size=8", "model.text_encoder.width=8"]
    words = ["--config_path", CONFIG, *set_words([*tiny, "model.text_encoder.layers=1"])]
    assert run_script(TRAIN_CLIP, *words, "--batch_size", 10, "--output_path", file) == 1
    assert re.search(
        r"^error: training stopped after step \d, loss nan, .*; last good checkpoint: none$",
        capfd.readouterr().err,
        re.MULTILINE,
    )
    assert not list(tmp_path.rglob("*.safetensors"))
    assert json.loads((tmp_path / "clip/diverged.json").read_text())["batch_indices"]
    assert json.loads((tmp_path / "clip/run.json").read_text())["segments"][0]["status"] == "diverged"


@pytest.mark.parametrize("name", ["folder", "clip.pt", "closed/clip.safetensors", "link/clip.safetensors"])
def test_a_place_where_no_tiny_clip_can_be_written(name, tmp_path, capfd):
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").write_text("a file")
    (tmp_path / "link").symlink_to("gone")
    assert run_script(TRAIN_CLIP, "--config_path", CONFIG, "--output_path", tmp_path / name) == 2
    assert str(tmp_path / name).removesuffix("/clip.safetensors") in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("signals", "status"), [(["SIGINT", "SIGINT"], 130), (["SIGINT", "SIGTERM"], 143), (["SIGTERM"], 7)])
def test_the_second_signal_quits_at_once(signals, status):
    code = """
import os, sys
from xdiffusion.training.interruption import Interruption
with Interruption() as interruption:
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(__import__("signal"), name))
    assert interruption.signal
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code, *signals], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status
    assert "stopping after this step; again to quit at once" in done.stderr


def test_what_a_disk_refuses_of_a_state_is_said_in_its_own_words(tmp_path):
    """torch's own writer says "unexpected pos" there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*state.pt: .*File too large"):
            save_pickled(tmp_path / "state.pt", {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


FULL = OSError(28, "No space left on device")
LOST = FileNotFoundError(2, "No such file", "a.png")
FAULTS = {  # which call fails from which one on, with what; the last good checkpoint, and what is said
    "metrics on a full disk": (Records, "step", 4, FULL, 2, "after step 4, .*No space left"),
    "data that vanished": (ImageSet, "batch", 4, LOST, 2, "after step 3, .*a.png"),
    "a checkpoint on a full disk": (
        torch,
        "save",
        3,
        FULL,
        4,
        "after step 5, cannot write .*diffusion-5.state.pt: .*No space",
    ),
}


@pytest.mark.parametrize(("target", "name", "first", "error", "good", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_run_goes_on_from_its_last_good_checkpoint(target, name, first, error, good, reason, tmp_path, monkeypatch, capfd):
    calls, original = [], getattr(target, name)

    def failing(*arguments, **keywords):
        calls.append(name)
        if len(calls) >= first:
            raise error
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing)
        assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.search(f"error: training stopped {reason}", line)
    assert f"last good checkpoint: {tmp_path}/diffusion-{good}.safetensors; to go on from it: python " in line
    assert read_run(tmp_path)["segments"][-1]["status"] == "failed"
    assert not list(tmp_path.glob(".*.tmp"))
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path, "--resume_from", "auto") == 0
    segment = read_run(tmp_path)["segments"][-1]
    assert (segment["first_step"], segment["last_step"]) == (good + 1, STEPS)


def out_of_memory() -> RuntimeError:
    """What torch raises where a CPU has no more."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    return raised.value


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("image/folder: none of the pictures is whole"), 1, "none of the pictures is whole"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
        (RuntimeError("CUDA error: out of memory"), 1, "CUDA error: out of memory"),
        (MemoryError(), 1, "MemoryError"),
        (out_of_memory(), 1, "can't allocate memory: you tried to allocate "),
        (KeyError("a mistake"), None, "a mistake"),
    ],
)
def test_whatever_ends_a_run_the_last_good_checkpoint_is_named(error, status, said, tmp_path, monkeypatch, capfd):
    """A mistake in the code goes on up, so that its place is seen."""
    calls, batch = [], ImageSet.batch

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return batch(*arguments)

    monkeypatch.setattr(ImageSet, "batch", failing)
    with pytest.raises(KeyError) if status is None else nullcontext():
        assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == status
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert said in line and f"last good checkpoint: {tmp_path}/diffusion-2.safetensors; to go on" in line
    assert ("what takes less is in docs/lessons/04-stable-diffusion.md, Troubleshooting" in line) == ("emory" in said)
    assert read_run(tmp_path)["segments"][-1]["status"] == "failed"


def test_a_disk_too_full_for_the_record_still_names_the_last_good_checkpoint(tmp_path, monkeypatch, capfd):
    """All writes fail from step 3 on, run.json's too."""
    written = writing.write_atomically

    def full(path, write):
        if (tmp_path / "diffusion-2.state.pt").exists():
            raise CheckpointError(f"cannot write {path}: {FULL}")
        return written(path, write)

    monkeypatch.setattr(writing, "write_atomically", full)
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line
    assert f"last good checkpoint: {tmp_path}/diffusion-2.safetensors; to go on from it: python" in line


def test_damage_is_named_by_the_command(tmp_path, capfd):
    words = [*COMMON, "--output_path", tmp_path]
    assert run_script(TRAIN, *words) == 0
    for step, damaged in ((5, state_path), (4, lambda path: path)):
        path = damaged(tmp_path / f"diffusion-{step}.safetensors")
        path.write_bytes(path.read_bytes()[:-100])
    assert run_script(TRAIN, *words, "--resume_from", "auto") == 0
    err = capfd.readouterr().err
    assert re.search(r"damaged checkpoint: .*diffusion-5\.state\.pt .*; trying the one before", err)
    assert re.search(r"damaged checkpoint: .*diffusion-4\.safetensors .*; trying the one before", err)
    assert read_run(tmp_path)["segments"][-1]["first_step"] == 3


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    """A kill in the middle of its writing leaves what was written of it; the resumed run draws it."""

    class Killed(BaseException):
        pass

    def save(self, file, *_, **__):
        Path(file).write_bytes(b"half of it")
        raise Killed

    words = [*COMMON, "--output_path", tmp_path, "--resume_from", "auto"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Image.Image, "save", save)
        run_script(TRAIN, *words)
    picture = tmp_path / "samples" / "sample-2.png"
    assert not picture.exists()
    assert run_script(TRAIN, *words) == 0
    assert Image.open(picture).text["title"] == "step 2"


def test_temporary_files_of_a_killed_run_are_cleaned_away(tmp_path):
    (tmp_path / "samples").mkdir()
    left = [tmp_path / ".diffusion-2.safetensors.ab12.tmp", tmp_path / "samples" / ".sample-2.png.cd34.tmp"]
    other = [tmp_path / "notes.tmp", tmp_path / ".hidden"]
    for path in (*left, *other):
        path.touch()
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", tmp_path) == 0
    assert not any(map(Path.exists, left))
    assert all(map(Path.exists, other))


def test_a_killed_process_leaves_a_segment_that_says_running(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def step(self, metrics):
        raise Killed

    monkeypatch.setattr(Records, "step", step)
    with pytest.raises(Killed):
        run_script(TRAIN, *COMMON, "--output_path", tmp_path)
    assert read_run(tmp_path)["segments"][-1]["status"] == "running"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
