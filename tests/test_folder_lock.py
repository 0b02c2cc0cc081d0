"""One run in a folder at a time."""

import errno
import fcntl
import subprocess
import sys
from threading import Thread

from commands import ROOT, TRAIN, run_script, set_words
from test_resume import COMMON

from xdiffusion.training import folder_lock


def test_a_second_run_in_a_folder_ends_at_once_and_leaves_the_first_alone(tmp_path, capfd):
    """Of another process too; one that is killed frees the folder."""
    code = "import sys, time; from pathlib import Path; from xdiffusion.training.folder_lock import held\n"
    code += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    folder = tmp_path / "run"
    words = [*COMMON, "--num_training_steps", 1, "--output_path", folder]
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        assert run_script(TRAIN, *words) == 2
        assert capfd.readouterr().err.splitlines()[-1] == (
            f"error: {folder} is in use by another run: wait for its end, or name another folder with --output_path"
        )
        assert [path.name for path in folder.iterdir()] == [".lock"]
        other.kill()
    assert run_script(TRAIN, *words) == 0
    assert not (folder / ".lock").exists()


def test_who_makes_a_file_is_waited_for(tmp_path, capfd):
    path = tmp_path / "new/clip.safetensors"
    entered = []

    def make(name):
        with folder_lock.in_turn(path):
            entered.append(name)

    with folder_lock.in_turn(path):
        other = Thread(target=make, args=["other"])
        other.start()
        other.join(timeout=1.5)
        assert other.is_alive() and not entered
    other.join(timeout=30)
    assert entered == ["other"]
    assert capfd.readouterr().out == f"another run makes {path}: waiting for its end\n"
    assert list(path.parent.iterdir()) == []


def test_two_runs_that_need_the_same_tiny_clip_have_it_of_one_of_them(tmp_path):
    words = ["model.text_encoder.pretrained=tiny", "clip.training.num_training_steps=30", "clip.training.batch_size=10"]
    command = [sys.executable, ROOT / TRAIN, *COMMON, *set_words(words), "--num_training_steps", 1]
    runs = [
        subprocess.Popen([*map(str, command), "--output_path", name], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted("training it" in text for text in said) == [False, True]


def test_a_lock_that_its_run_has_taken_away_holds_nothing(tmp_path):
    """Whoever opened it just before that has nothing, for a third run may have made a new one."""
    with (tmp_path / ".lock").open("w") as file:
        assert folder_lock._locked(file)
        (tmp_path / ".lock").unlink()
        assert not folder_lock._locked(file)


def test_a_disk_without_locks_is_trained_on(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", tmp_path) == 0
    (tmp_path / ".lock").touch()
    assert folder_lock.in_use(tmp_path)  # nobody can tell
