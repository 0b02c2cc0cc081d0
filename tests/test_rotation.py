"""Which checkpoints of a run stay: the last ones, one that the next steps have shown to be good, and what is set aside."""

import json
import signal

import pytest
from commands import TRAIN, run_script
from test_resume import COMMON
from test_state import flipped, fresh, train

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.training.state import write_state


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [([], [1, 2, 3, 4, 5]), (["keep_last=2"], [4, 5]), (["keep_last=1", "keep_every=2"], [2, 4, 5])],
)
def test_old_checkpoints_are_rotated(overrides, kept, tmp_path):
    """One more is there until the next step, or the end of the run, has shown the newest to be good."""
    words = ["training.save_and_sample_every_n=1", *(f"checkpoints.{word}" for word in overrides)]
    trainer, files = fresh(tmp_path, words)
    train(trainer, files, stop_after=4)
    assert files._steps()[-2:] == [3, 4]
    train(trainer, files, first_step=5)
    files.rotate()
    assert files._steps() == kept
    assert len(list(tmp_path.iterdir())) == 2 * len(kept)


def test_the_rotation_keeps_what_is_whole_if_the_newest_is_not(tmp_path, monkeypatch):
    trainer, files = fresh(tmp_path, ["checkpoints.keep_last=1"])
    train(trainer, files, stop_after=3)

    def damaged(path, state):
        write_state(path, state)
        path.write_bytes(flipped(path.read_bytes(), 5000))

    monkeypatch.setattr("xdiffusion.training.state.write_state", damaged)
    files.save(trainer, 4)
    files.finish()
    with pytest.raises(CheckpointError, match=r"diffusion-4\.safetensors is damaged"):
        files.rotate()
    assert files.newest() == files.path(2)


def test_the_states_of_an_earlier_run_are_set_aside(tmp_path):
    trainer, files = fresh(tmp_path)
    train(trainer, files)
    files.set_aside(after=2)
    assert files._steps() == [2]
    files.set_aside(after=0)
    assert files.newest() is None
    assert files.resume(trainer, "auto") == 0
    assert files.path(5).is_file()
    (tmp_path / "diffusion-4.state.pt.earlier").rename(tmp_path / "diffusion-4.state.pt")
    assert files.newest() == files.path(4)
    train(trainer, files)  # replaces the weights, of which a state set aside is no more one
    assert not list(tmp_path.glob("*.earlier"))


def of_another_training(folder, *steps):
    """Weights without a state, as of a run whose states were deleted to save room."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        (folder / f"diffusion-{step}.safetensors").write_bytes(b"the only copy")
    return folder


def kept(folder):
    return {path.name for path in folder.glob("diffusion-*") if path.read_bytes() == b"the only copy"}


@pytest.mark.parametrize("step", [1, 4])
def test_weights_that_no_kill_explains_are_not_begun_over(step, tmp_path, capfd):
    """The first checkpoint of this run would be that of step 2."""
    assert run_script(TRAIN, *COMMON, "--output_path", of_another_training(tmp_path, step), "--resume_from", "auto") == 2
    assert f"no checkpoint in {tmp_path} is whole, of 1 that stand there" in capfd.readouterr().err
    assert kept(tmp_path) == {f"diffusion-{step}.safetensors"}


def test_a_kill_in_the_first_checkpoint_leaves_weights_that_are_set_aside(tmp_path, capfd):
    """Unless run.json tells that this run was saving them; then also those of a step at which a signal came."""
    words = [*COMMON, "--output_path", of_another_training(tmp_path, 2), "--num_training_steps", 2, "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 0
    assert "renamed to diffusion-2.safetensors.earlier\n" in capfd.readouterr().err
    assert kept(tmp_path) == {"diffusion-2.safetensors.earlier"}
    folder = of_another_training(tmp_path / "signal", 1)
    segment = {"status": "running", "first_step": 1, "last_step": 1}
    (folder / "run.json").write_text(json.dumps({"config": {}, "segments": [segment]}))
    assert fresh(folder)[1].resume(None, "auto") == 0  # although step 2 is the first that is due
    often = ["--output_path", folder, "--num_training_steps", 2, "--save_and_sample_every_n", 1, "--resume_from", "auto"]
    assert run_script(TRAIN, *COMMON, *often) == 0
    assert not kept(folder)


def test_weights_without_a_state_are_not_replaced(tmp_path, signals, capfd):
    folder = of_another_training(tmp_path, 0, 1, 2, 4, 5, 6)
    signals[1] = signal.SIGINT
    assert run_script(TRAIN, *COMMON, "--output_path", folder) == 130
    said = f"{folder} holds weights without a state that would be replaced: renamed to diffusion-"
    err = capfd.readouterr().err
    assert f"{said}2.safetensors.earlier to diffusion-5.safetensors.earlier (3 files)\n" in err
    assert f"{said}1.safetensors.earlier\n" in err  # that it would stop there no run can tell at its start
    names = {f"diffusion-{step}.safetensors.earlier" for step in (1, 2, 4, 5)}
    names |= {"diffusion-0.safetensors", "diffusion-6.safetensors"}
    assert kept(folder) == names
    of_another_training(folder, 2)
    assert run_script(TRAIN, *COMMON, "--output_path", folder, "--num_training_steps", 2) == 0
    assert kept(folder) == names | {"diffusion-2.safetensors.earlier-2"}


def test_a_resumed_run_replaces_what_a_kill_has_cut_short(tmp_path):
    words = [*COMMON, "--output_path", tmp_path]
    assert run_script(TRAIN, *words, "--num_training_steps", 2) == 0
    of_another_training(tmp_path, 4)
    assert run_script(TRAIN, *words, "--resume_from", "auto") == 0
    assert not kept(tmp_path) and not list(tmp_path.glob("*.earlier"))
