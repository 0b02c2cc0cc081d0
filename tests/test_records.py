"""What a run leaves to read: metrics.jsonl, TensorBoard and the loss curve, also after a resume."""

import itertools
import json
import math
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from xdiffusion.training.loop import StepMetrics
from xdiffusion.training.records import Records, draw_loss_curve, on_a_log_scale, read_metrics, run_name, smoothed


def metrics(step, loss=None):
    return StepMetrics(step, loss or 1 / step, grad_norm=2.0, learning_rate=0.1, images_per_second=50.0)


def record(folder, first, last, loss=None):
    with Records(folder, first, last) as records:
        for step in range(first, last + 1):
            records.step(metrics(step, loss))


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(name)]


def test_a_run_leaves_its_record(tmp_path):
    record(tmp_path, 1, 25)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert lines[3] == {
        "step": 4, "loss": 0.25, "grad_norm": 2.0, "learning_rate": 0.1, "images_per_second": 50.0,
        "loss_scale": None, "skipped": False,
    }  # fmt: skip
    assert scalars(tmp_path, "loss") == [(10, 0.1), (20, 0.05), (25, 0.04)]
    assert scalars(tmp_path, "learning_rate") == [(10, 0.1), (20, 0.1), (25, 0.1)]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # lines and text, not an empty page


def test_a_gradient_that_overflows_is_null(tmp_path):
    with Records(tmp_path, 1, 1) as records:
        records.step(replace(metrics(1), grad_norm=math.inf, loss_scale=1024.0, skipped=True))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"grad_norm": null' in line and '"skipped": true' in line


def test_a_log_file_is_not_filled_with_bars(tmp_path, monkeypatch, capsys):
    moment = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(moment)))
    record(tmp_path, 1, 100)
    assert 3 <= capsys.readouterr().err.count("100 [") < 10


def test_steps_that_fp16_skipped_are_counted(tmp_path):
    with Records(tmp_path, 1, 20) as records:
        for step in range(1, 21):
            records.step(replace(metrics(step), loss_scale=1024.0, skipped=step in (3, 7, 15)))
    assert scalars(tmp_path, "skipped") == [(10, 2), (20, 1)]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    record(tmp_path, 1, 12, loss=1.0)
    record(tmp_path, 9, 20, loss=2.0)
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((step, 1.0) for step in range(1, 9)),
        *((step, 2.0) for step in range(9, 21)),
    ]
    assert scalars(tmp_path, "loss") == [(10, 2.0), (20, 2.0)]


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path):
    record(tmp_path, 1, 3, loss=1.0)
    record(tmp_path, 1, 2, loss=2.0)
    assert [m["loss"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 2.0]


def test_every_step_is_on_the_disk_at_once(tmp_path):
    with Records(tmp_path, 1, 2) as records:
        records.step(metrics(1))
        assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 1


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path):
    record(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [m["step"] for m in read_metrics(path)] == [1, 2]
    record(tmp_path, 3, 4)
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4]
    assert not list(read_metrics(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "[1]",
        '{"step": 2}',
        '{"step": 2, "loss": "a"}',
        '{"step": "2", "loss": 1}',
        '{"step": true, "loss": 1}',
        '{"step": 2, "loss": 1%s}' % ("0" * 400),
        '{"step": 2, "loss": 1%s}' % ("0" * 5000),
        '{"step": 2, "lo',
        "\0\0",
    ],
    ids=range(10),
)
def test_a_line_that_says_no_step_and_loss_is_named(line, tmp_path, capsys):
    """The others are kept, also by a run that is resumed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1}}\n{line}\n{line}\n{{"step": 3, "loss": 2}}\n')
    record(tmp_path, 4, 4)
    (named,) = (said for said in capsys.readouterr().err.splitlines() if "damaged" in said)
    assert re.search(r"metrics\.jsonl: 2 damaged lines are left out, the first is line 2: ", named)
    assert len(named) < 400
    assert [m["step"] for m in read_metrics(path)] == [1, 3, 4]


def test_damaged_lines_without_end_take_no_memory(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("x\n" * 100_000)
    tracemalloc.start()
    assert list(read_metrics(path)) == []
    assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    tracemalloc.stop()
    assert "100000 damaged lines are left out, the first is line 1: " in capsys.readouterr().err


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}%s\n' % (" " * 2**20))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: a row of more than"):
        draw_loss_curve(path, tmp_path / "loss.png")


def test_an_error_closes_the_record(tmp_path):
    with pytest.raises(KeyError, match="bug"), Records(tmp_path, 1, 9) as records:
        for step in (1, 2, 3):
            records.step(metrics(step))
        raise KeyError("bug")
    assert records.metrics.closed
    assert (tmp_path / "loss.png").is_file()


def test_a_picture_is_recorded(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Records(tmp_path, 1, 9) as records:
        records.sampled(5, Image.new("RGB", (30, 20), "red"), "sample-5.png")
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (event,) = accumulator.Images("samples")
    assert (event.step, event.width, event.height) == (5, 30, 20)


@pytest.mark.parametrize(("count", "window"), [(9, 1), (60, 7), (1700, 51)])
def test_the_running_mean_is_centred_and_narrow_where_a_run_is_short(count, window):
    """Of a line it is the line, so it lies neither above nor beside the data."""
    steps, mean = smoothed(*(factor * np.arange(1.0, count + 1) for factor in (1, 2)))
    assert len(steps) == len(mean) == count - window + 1
    assert mean.tolist() == pytest.approx([2.0 * step for step in steps])
    assert smoothed(np.array([1.0, 2.0]), np.array([3.0, 4.0]))[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("folder", "name"), [("out/digits", "digits"), ("out/digits/lora", "digits, LoRA"), ("mine", "mine")])
def test_a_run_goes_by_its_configs_name(folder, name, tmp_path):
    with Records(tmp_path / folder, 1, 2) as records:
        assert records.bar.desc.removesuffix(": ") == run_name(tmp_path / folder) == name


@pytest.mark.parametrize("count", [0, 1])
def test_no_curve_of_less_than_two_points(count, tmp_path):
    record(tmp_path, 1, count)
    assert not (tmp_path / "loss.png").exists()


def test_a_curve_of_losses_that_are_not_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate([1.0, math.nan, math.inf, 0.5]))
    )
    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.95, 0.26], {"0.3", "0.5"}),
        ([0.95, 0.09], {"0.1", "0.2", "0.3", "0.5"}),
        ([3e3, 0.05], {"0.1", "10", "1000"}),
        ([1.05, 0.91], {"0.95", "1", "1.05"}),
        ([0.0123, 0.0051], {"0.006", "0.012"}),
    ],
)
def test_losses_are_labelled_as_they_are_read(losses, expected):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses)
    on_a_log_scale(axes)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    labels = {label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high}
    assert expected <= labels and not any("$" in label for label in labels)
    assert len(labels) <= 12
