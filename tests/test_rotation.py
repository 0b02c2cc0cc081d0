"""Which checkpoints of a run stay: the last ones, one that the next steps have shown to be good, and what is set aside."""

import pytest
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
