"""Runs side by side: the table, the picture, and what is no run."""

import json
import math
import re
from functools import reduce

import pytest
from commands import run_process, run_script
from PIL import Image

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.training.comparison import as_text, outcome, read_runs
from xdiffusion.training.folder_lock import held

COMPARE = "training/image/compare.py"


def write_run(folder, rate, segments, losses):
    folder.mkdir(parents=True)
    config = {"optimizer": {"learning_rate": rate, "betas": [0.9, 0.99]}, "training": {"seed": 0}}
    run = {"config": config, "data": {"fingerprint": "0123456789abcdef"}, "segments": segments}
    (folder / "run.json").write_text(json.dumps(run))
    lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    git = {"commit": "a" * 40, "dirty": True, "diff": "0123456789abcdef"}
    whole = {
        "status": "finished",
        "first_step": 1,
        "last_step": 60,
        "seconds": 30.0,
        "peak_memory_bytes": 3 * 2**20,
        "git": git,
    }
    killed = {"status": "running", "first_step": 1}
    rest = {
        "status": "finished",
        "first_step": 11,
        "last_step": 60,
        "seconds": 10.0,
        "peak_memory_bytes": 2**20,
        "git": None,
        "changes": ["optimizer.learning_rate=0.004 before, 0.002 now"],
    }
    first = write_run(tmp_path / "x/a", 1e-3, [whole], [2.0] * 10 + [1.0] * 50)
    second = write_run(tmp_path / "x/b", 2e-3, [killed, rest], [2.0] * 60)
    return first, second


def cells(text):
    """{first cell: the others}, for cells without double spaces."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_table_says_what_differs_and_what_came_of_it(runs, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    assert run_script(COMPARE, *runs, "--output_path", picture) == 0
    printed = capsys.readouterr().out
    found = cells(printed)
    assert printed.splitlines()[0].split() == ["a", "b"]
    assert found["optimizer.learning_rate"] == ["0.001", "0.002"]
    assert not {"training.seed", "optimizer.betas"} & found.keys()
    assert found["loss, mean of last 50"] == ["1.0000", "2.0000"]
    assert found["steps/s"] == ["2", "5"]  # of the segments that were not killed
    assert found["seconds"] == ["30.0", "10.0"]
    assert found["peak memory, MB"] == ["3", "1"]
    assert found["starts"] == ["1", "2"]
    assert found["conditions changed at step"] == ["-", "11"]
    assert found["commit"] == ["aaaaaaaaa + changes 012345", "-"]
    with Image.open(picture) as page:
        assert len(page.convert("RGB").getcolors(1 << 20)) > 10


def test_what_is_trained_and_from_where_is_a_difference_too(tmp_path, capsys):
    """A LoRA's config is also a model's, and says nothing of the base."""
    from_base = ["train.py", "--load_model_weights_from_checkpoint", "a.safetensors"]
    commands = {
        "tuned": (from_base, None),
        "lora": ([*from_base, "--use_lora_training"], "0123456789abcdef"),
        "word": (["train.py", "--load_model_weights_from_checkpoint=b.safetensors"], "fedcba9876543210"),
        "fresh": (["train.py"], None),
    }
    folders = []
    for name, (command, base) in commands.items():
        segment = {"status": "finished", "first_step": 1, "last_step": 2, "seconds": 1.0, "command": command}
        folders.append(write_run(tmp_path / name, 1.0, [segment], [1.0, 1.0]))
        record = json.loads((folders[-1] / "run.json").read_text()) | {"base": base}
        (folders[-1] / "run.json").write_text(json.dumps(record))
    assert run_script(COMPARE, *folders, "--output_path", tmp_path / "c.png") == 0
    found = cells(capsys.readouterr().out)
    assert found["trains"] == ["model", "LoRA", "learned word", "model"]
    assert found["base"] == ["-", "012345678", "fedcba987", "-"]
    assert found["begins from"] == ["a.safetensors", "a.safetensors", "b.safetensors", "-"]


def test_an_average_that_the_losses_do_not_show(runs, tmp_path, capsys):
    for folder, decay in zip(runs, (0.0, 0.999)):
        record = json.loads((folder / "run.json").read_text())
        record["config"]["training"]["ema_decay"] = decay
        (folder / "run.json").write_text(json.dumps(record))
    assert run_script(COMPARE, *runs, "--output_path", tmp_path / "c.png") == 0
    printed = capsys.readouterr()
    assert cells(printed.out)["training.ema_decay"] == ["0.0", "0.999"]
    assert "training.ema_decay differs: these losses are of the weights before the average" in printed.err
    assert run_script(COMPARE, runs[0], "--output_path", tmp_path / "c.png") == 0
    assert "ema_decay" not in capsys.readouterr().err


def test_a_run_that_was_killed_does_not_run(tmp_path, capsys):
    """Its run.json says that it does, as it did when it was written last."""
    folder = write_run(tmp_path / "a", 1e-3, [{"status": "running", "first_step": 1}], [2.0] * 10)
    with held(folder):
        assert run_script(COMPARE, folder) == 0
    assert cells(capsys.readouterr().out)["status"] == ["running"]
    (folder / ".lock").touch()  # which a killed run leaves
    for _ in range(2):
        assert run_script(COMPARE, folder) == 0
        assert cells(capsys.readouterr().out)["status"] == ["cut short"]
        (folder / ".lock").unlink(missing_ok=True)


def test_one_run_may_be_looked_at_alone(runs, tmp_path, capsys):
    assert run_script(COMPARE, runs[0], "--output_path", tmp_path / "c.png") == 0
    assert "optimizer" not in capsys.readouterr().out


def test_runs_are_read_and_smoothed(runs):
    a, b = read_runs(list(runs))
    assert (a.name, b.name) == ("a", "b")
    assert outcome(b)["smallest smoothed loss"] == "2.0000"
    assert as_text([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"


def test_losses_that_no_run_can_have_are_left_out(tmp_path, capsys):
    segment = {"status": "diverged", "first_step": 1, "last_step": 2, "seconds": 1.0}
    folder = write_run(tmp_path / "a", 1.0, [segment], [1.0, math.nan, math.inf, -math.inf, 1e308, 1e308])
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {sign}1{"0" * 308}, "loss": 1}}\n' for sign in ("", "-"))
    assert run_script(COMPARE, folder, "--output_path", tmp_path / "c.png") == 0
    printed = capsys.readouterr()
    assert cells(printed.out)["loss, mean of last 50"] == ["1.0000"]
    assert "metrics.jsonl: 7 damaged lines are left out, the first is line 2: " in printed.err


def test_a_start_that_went_back_behind_itself_took_no_steps(tmp_path):
    went = {"status": "diverged", "first_step": 7, "last_step": 5, "seconds": 3.0}
    whole = {"status": "finished", "first_step": 6, "last_step": 8, "seconds": 3.0}
    folder = write_run(tmp_path / "a", 1.0, [went, whole], [1.0] * 8)
    (run,) = read_runs([folder])
    assert outcome(run)["steps/s"] == "0.5"


@pytest.mark.parametrize("wrong", ["missing", "no run", "damaged", "no step", "twice", "unwritable"])
def test_what_cannot_be_compared(wrong, runs, tmp_path, capsys):
    first, second = runs
    picture = tmp_path / "c.png"
    expected = {
        "missing": "no run in .*nowhere: it has no run.json",
        "no run": "no run in .*: it has no run.json",
        "damaged": "run.json is damaged",
        "no step": "its metrics.jsonl has no step",
        "twice": "a run is named twice",
        "unwritable": "cannot write .*c.png",
    }[wrong]
    if wrong == "missing":
        second = tmp_path / "nowhere"
    elif wrong == "no run":
        (second / "run.json").unlink()
    elif wrong == "damaged":
        (second / "run.json").write_text('{"config": 3}')
    elif wrong == "no step":
        (second / "metrics.jsonl").write_text("")
    elif wrong == "twice":
        second = first
    else:
        (tmp_path / "file").touch()
        picture = tmp_path / "file" / "c.png"
    assert run_script(COMPARE, first, second, "--output_path", picture) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{expected}", line)


STEP = '{"step": 1, "loss": 0.5}\n'
WHOLE = {"config": {}, "segments": [{"status": "finished"}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"config": []},
        {"config": reduce(lambda inner, _: {"a": inner}, range(100), 1)},
        {"config": {"a": reduce(lambda inner, _: [inner], range(100), 1)}},
        {"segments": []},
        {"segments": {}},
        {"segments": [{"status": None}]},
        {"segments": [{"first_step": 1}]},
        {"segments": [{"status": "finished", "seconds": 3}]},
        {"segments": [{"status": "finished", "seconds": "3", "first_step": 1, "last_step": 2}]},
        {"segments": [{"status": "finished", "git": [1]}]},
        {"segments": [{"status": "finished", "git": {"commit": 5}}]},
        {"segments": [{"status": "finished", "peak_memory_bytes": "much"}]},
        {"segments": [{"status": "finished", "peak_memory_bytes": 10**400}]},
        {"segments": [{"status": "finished", "seconds": math.nan, "first_step": 1, "last_step": 2}]},
        {"segments": [{"status": "finished", "seconds": 10**400, "first_step": 1, "last_step": 2}]},
        {"segments": [{"status": "finished", "seconds": 1, "first_step": 1, "last_step": -(10**400)}]},
        {"segments": [{"status": "finished", "device": {}}]},
        {"segments": [{"status": "finished", "changes": ["a"]}]},
        {"data": 5},
        {"data": []},
        {"data": {"fingerprint": 5}},
    ],
)
def test_a_run_of_odd_values_is_named(changes, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(STEP)
    (tmp_path / "run.json").write_text(json.dumps(WHOLE | changes))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        read_runs([tmp_path])


def test_a_run_json_without_end_is_not_read(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged .*it has more than 8,388,608 bytes"):
        read_runs([tmp_path])


def test_help_loads_nothing_heavy():
    done = run_process(COMPARE, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert not {"torch", "numpy", "matplotlib"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
