"""Which checkpoints of a run stay: the last ones, one that the next steps have shown to be good, and what is set aside."""

import signal
import time
from contextlib import suppress

import pytest
from commands import TRAIN, run_script
from test_resume import COMMON
from test_state import flipped, fresh, train

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.training.exports import export_paths
from xdiffusion.training.records import Records
from xdiffusion.training.state_files import aside_path, saving_path, state_path, write_state


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


@pytest.mark.parametrize("step", [1, 2, 4])
def test_weights_that_no_kill_explains_are_not_begun_over(step, tmp_path, capfd):
    """The first checkpoint of this run would be that of step 2."""
    assert run_script(TRAIN, *COMMON, "--output_path", of_another_training(tmp_path, step), "--resume_from", "auto") == 2
    assert f"no checkpoint in {tmp_path} is whole, of 1 that stand there" in capfd.readouterr().err
    assert kept(tmp_path) == {f"diffusion-{step}.safetensors"}


class Killed(BaseException):
    """As nothing of the run sees it."""


@pytest.fixture
def killed_at(monkeypatch):
    """Lets a training command end at a step's line or, by "state", where it would write its first state."""

    def run(where, *words):
        def end(*_):
            raise Killed

        def at_line(records, metrics, line=Records.step):
            line(records, metrics)
            if metrics.step == where:
                raise Killed

        with monkeypatch.context() as patch:
            if where == "state":
                patch.setattr("xdiffusion.training.state.write_state", end)
            else:
                patch.setattr(Records, "step", at_line)
            patch.setattr("threading.excepthook", lambda *_: None)
            with suppress(Killed):
                run_script(TRAIN, *words)

    return run


def test_kills_around_the_first_checkpoint_leave_nothing_behind(killed_at, tmp_path, signals, capfd):
    """In it, before it, and in one that a signal asks for: the run that goes on takes the steps of all again."""
    words = [*COMMON, "--output_path", tmp_path / "run", "--resume_from", "auto"]
    killed_at("state", *words)
    assert (tmp_path / "run/diffusion-2.safetensors").is_file() and (tmp_path / "run/diffusion-2.saving").is_file()
    killed_at(1, *words)
    assert not list((tmp_path / "run").glob("diffusion-*"))
    signals[1] = signal.SIGINT
    killed_at("state", *words)
    assert (tmp_path / "run/diffusion-1.safetensors").is_file()
    signals.clear()
    killed_at(1, *words)
    assert run_script(TRAIN, *words) == 0
    assert "earlier" not in capfd.readouterr().err
    assert {path.suffix for path in (tmp_path / "run").glob("diffusion-*")} == {".safetensors", ".pt"}
    words[words.index(tmp_path / "run")] = tmp_path / "whole"
    assert run_script(TRAIN, *words) == 0
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("run", "whole")]
    assert names[0] == names[1]


def test_all_that_was_written_of_what_was_cut_short_goes_with_it(tmp_path):
    _, files = fresh(tmp_path, lora=True)
    cut_short, whole = files.path(2), [files.path(4), state_path(files.path(4))]
    for path in (cut_short, *export_paths(cut_short), saving_path(cut_short), aside_path(cut_short), *whole):
        path.touch()
    files.goes_on = True
    files.clear_cut_short()
    assert sorted(tmp_path.iterdir()) == sorted(whole)


def test_weights_cut_short_are_another_trainings_to_a_run_begun_anew(killed_at, tmp_path):
    words = [*COMMON, "--output_path", tmp_path]
    killed_at("state", *words)
    weights = (tmp_path / "diffusion-2.safetensors").read_bytes()
    assert run_script(TRAIN, *words, "--num_training_steps", 3) == 0
    assert (tmp_path / "diffusion-2.safetensors.earlier").read_bytes() == weights
    assert not list(tmp_path.glob("*.saving"))


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


def test_a_resumed_run_replaces_what_a_kill_has_cut_short(killed_at, tmp_path):
    words = [*COMMON, "--output_path", tmp_path]
    assert run_script(TRAIN, *words, "--num_training_steps", 2) == 0
    killed_at("state", *words, "--resume_from", "auto")
    assert (tmp_path / "diffusion-4.saving").is_file()
    assert run_script(TRAIN, *words, "--resume_from", "auto") == 0
    assert not list(tmp_path.glob("*.earlier")) and not list(tmp_path.glob("*.saving"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_was_cut_short_is_taken_away_by_its_own_run_alone(elsewhere, killed_at, tmp_path):
    """A file that is named may be of this folder's run, or of another one's that goes on here."""
    words = [*COMMON, "--output_path", tmp_path / "run"]
    assert run_script(TRAIN, *words, "--num_training_steps", 2) == 0
    from_file = tmp_path / "run/diffusion-2.safetensors"
    if elsewhere:
        from_file = (tmp_path / "run").rename(tmp_path / "other") / from_file.name
    killed_at("state", *words, "--resume_from", from_file, "--save_and_sample_every_n", 3)
    assert (tmp_path / ("run/diffusion-2.saving" if elsewhere else "run/diffusion-3.saving")).is_file()
    cut_short = next((tmp_path / "run").glob("*.saving")).with_suffix(".safetensors")
    weights = cut_short.read_bytes()
    assert run_script(TRAIN, *words, "--resume_from", from_file, "--num_training_steps", 4) == 0
    assert not list((tmp_path / "run").glob("*.saving"))
    aside = [path.read_bytes() for path in (tmp_path / "run").glob("*.earlier")]
    assert aside == ([weights] if elsewhere else [])
    assert cut_short.is_file() == elsewhere  # step 3 is not due in this run, step 2 is what it begins from


def test_a_run_goes_on_where_its_newest_checkpoint_is_damaged_on_the_disk(tmp_path, monkeypatch, capfd):
    """It keeps what it would have rotated away, says which is damaged, and writes the next one."""

    def at_line(records, metrics, line=Records.step):
        line(records, metrics)
        if metrics.step == 5:
            newest = wait_for(tmp_path / "diffusion-4.state.pt").with_name("diffusion-4.safetensors")
            newest.write_bytes(flipped(newest.read_bytes(), 5000))

    monkeypatch.setattr(Records, "step", at_line)
    words = ["--num_training_steps", 9, "--set", "checkpoints.keep_last=1", "--output_path", tmp_path]
    assert run_script(TRAIN, *COMMON, *words) == 0
    err = capfd.readouterr().err
    assert "damaged checkpoint: " in err and "diffusion-4.safetensors is damaged" in err and "those before it are kept" in err
    assert fresh(tmp_path)[1]._steps() == [9]


def wait_for(path):
    until = time.monotonic() + 60
    while not path.is_file():
        assert time.monotonic() < until
        time.sleep(0.01)
    return path
