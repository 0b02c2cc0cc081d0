"""run.json: enough to repeat a run and to judge its figures."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from picture_folders import write_pictures
from tiny import tiny_config, tiny_images

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.data.image_folder import load_image_folder
from xdiffusion.data.image_set import invert
from xdiffusion.training.run_record import (
    RunRecord,
    data_fingerprint,
    flat,
    git_state,
    package_versions,
    peak_memory,
    read_run,
    run_differences,
    settings_hash,
)

CPU = torch.device("cpu")


def record(folder, first_step=1, config=None, data=None):
    return RunRecord(folder, config or tiny_config(), ["train.py", "--seed", "0"], data or tiny_images(), CPU, 1, first_step)


def test_a_record_is_there_from_the_start_and_complete_at_the_end(tmp_path):
    run = record(tmp_path)
    begun = read_run(tmp_path)
    assert begun["segments"][0]["status"] == "running"
    assert "seconds" not in begun["segments"][0]
    run.last_step = 4
    run.update("finished")
    done = read_run(tmp_path)
    assert done["config"] == json.loads(json.dumps(done["config"]))
    assert done["config"]["training"]["batch_size"] == 8
    assert done["seeds"] == {"training": 0}
    assert done["data"] == {"name": "image/digits", "fingerprint": data_fingerprint(tiny_images())}
    (segment,) = done["segments"]
    assert (segment["status"], segment["first_step"], segment["last_step"]) == ("finished", 1, 4)
    assert segment["command"] == ["train.py", "--seed", "0"]
    assert segment["device"].startswith("cpu: ")
    assert segment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert segment["steps_per_second"] == pytest.approx(4 / segment["seconds"], rel=0.2)
    assert segment["peak_memory_bytes"] > 10**7
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_is_killed_leaves_the_figures_of_its_last_checkpoint(tmp_path):
    run = record(tmp_path)
    run.last_step = 2
    run.update()
    (segment,) = read_run(tmp_path)["segments"]
    assert (segment["status"], segment["last_step"]) == ("running", 2)
    assert segment["seconds"] > 0


def test_a_resumed_run_appends_a_segment_and_a_fresh_one_begins_anew(tmp_path):
    record(tmp_path).update("interrupted")
    again = record(tmp_path, first_step=3)
    assert again.changes == []
    again.update("finished")
    assert [s["status"] for s in read_run(tmp_path)["segments"]] == ["interrupted", "finished"]
    changed = record(tmp_path, 4, tiny_config("training.seed=1"), invert(tiny_images()))
    assert changed.changes[:2] == [
        "training.seed=0 before, 1 now",
        "data.name=image/digits before, image/digits_inverted now",
    ]
    assert changed.changes[2].startswith("data.fingerprint=")
    segments = read_run(tmp_path)["segments"]
    assert [segment.get("changes") for segment in segments] == [None, [], changed.changes]
    assert record(tmp_path, 5, tiny_config("training.seed=2")).changes == []  # it takes no step
    record(tmp_path)
    assert len(read_run(tmp_path)["segments"]) == 1


def test_a_resume_that_takes_no_step_leaves_the_config_of_those_that_were_taken(tmp_path):
    record(tmp_path).update("finished")
    steps = tiny_config().training.num_training_steps
    record(tmp_path, steps + 1, tiny_config("training.seed=1")).update("finished")
    assert read_run(tmp_path)["config"]["training"]["seed"] == 0
    record(tmp_path, steps, tiny_config("training.seed=1"))
    assert read_run(tmp_path)["config"]["training"]["seed"] == 1


def test_a_record_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(None).update("finished")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"config": {}}', '{"config": {}, "segments": [1]}', '{"config": 1, "segments": []}']
)
def test_damaged_records_are_named(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no run in .*: it has no run\.json"):
        read_run(tmp_path / "nowhere")


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path / "nowhere") is None
    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    assert state["diff"] is None
    (tmp_path / "site-packages").mkdir()  # of a project in whose folder the package is installed
    assert git_state(tmp_path / "site-packages") is None
    diffs = set()
    for content in ("2", "3"):
        (tmp_path / "a").write_text(content)
        changed = git_state(tmp_path)
        assert changed == state | {"dirty": True, "diff": changed["diff"]}
        diffs.add(changed["diff"])
    (tmp_path / "a").write_text("1")
    (tmp_path / "notes").write_text("not a source")
    assert git_state(tmp_path) == state
    (tmp_path / "xdiffusion").mkdir()
    for content in ("", "1"):
        (tmp_path / "xdiffusion/extra.py").write_text(content)
        assert git_state(tmp_path)["dirty"]
        diffs.add(git_state(tmp_path)["diff"])
    assert len(diffs) == 4 and None not in diffs
    one, two, *_ = diffs
    before, now = ({"config": {}, "data": {}, "segments": [{"packages": {}, "git": {"diff": diff}}]} for diff in (one, two))
    assert run_differences(before, now) == [f"git.diff={one} before, {two} now"]


def test_settings_are_the_same_wherever_the_files_lie():
    config = tiny_config()
    places = {"cache": {"folder": "elsewhere"}, "model": {"text_encoder": {"pretrained": "other.safetensors"}}}
    assert settings_hash(OmegaConf.merge(config, places)) == settings_hash(config)
    assert settings_hash(tiny_config("training.seed=1")) != settings_hash(config)


def test_a_fingerprint_is_of_pixels_and_labels():
    data = tiny_images()
    assert data_fingerprint(data) == data_fingerprint(tiny_images()) != data_fingerprint(tiny_images(seed=1))
    data.train.labels[0] += 1
    assert data_fingerprint(data) != data_fingerprint(tiny_images())


def test_a_fingerprint_of_pictures_is_of_their_files_too(tmp_path):
    write_pictures(tmp_path, [(16, 16)] * 2, ["a", "b"])
    load = partial(load_image_folder, 16, str(tmp_path), bucket_multiple=16)
    before = data_fingerprint(load())
    assert data_fingerprint(load()) == before
    path = sorted(tmp_path.glob("*.png"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])  # the same length
    assert data_fingerprint(load()) != before


def test_small_parts():
    assert flat({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
    assert package_versions()["python"].startswith("3.")
    assert peak_memory(CPU) > 10**7
    place = {"git": None, "device": "cpu: x86_64", "processes": 1, "threads": 1}
    other = {"git": {"commit": "abc"}, "device": "cuda: H100", "processes": 2, "threads": 4}
    before = {"config": {"a": 1, "b": 2}, "segments": [{"packages": {"torch": "1"}} | place]}
    now = {"config": {"a": 1, "c": 3}, "data": {}, "segments": [{"packages": {"torch": "2"}} | other]}
    assert run_differences(before, now) == [
        "b=2 before, None now", "c=None before, 3 now", "version of torch=1 before, 2 now", "git.commit=None before, abc now",
        "device=cpu: x86_64 before, cuda: H100 now", "processes=1 before, 2 now", "threads=1 before, 4 now",
    ]  # fmt: skip


def test_texts_are_utf_8_whatever_the_locale(tmp_path):
    """A config.yaml names the user's folders, and is read as UTF-8."""
    code = "import pathlib; from xdiffusion.checkpoints.writing import write_text\n"
    code += f"write_text(pathlib.Path({str(tmp_path / 'config.yaml')!r}), 'data_dir: b\\u00fccher')"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **plain})
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "data_dir: bücher"
