"""Runs that diverge: what is let through, what is written, and the way back."""

import json
import math

import pytest
import torch
from commands import TRAIN, run_script
from test_resume import COMMON, STEPS
from tiny import tiny_config, tiny_trainer

from xdiffusion.training.divergence import LossWatch, TrainingDiverged
from xdiffusion.training.loop import Trainer
from xdiffusion.training.records import Records, read_metrics
from xdiffusion.training.run_record import read_run


def test_the_limit_follows_the_median_of_the_last_losses():
    watch = LossWatch(stop_above=3.0)
    for loss in [*[1.0] * 18, 100.0]:
        assert watch.limit() == math.inf  # too few to compare with
        watch.losses.append(loss)
    watch.losses.append(1.0)
    assert watch.limit() == 3.0
    watch.restore([2.0] * 300)
    assert (len(watch.losses), watch.limit()) == (100, 6.0)
    never = LossWatch(None)
    never.restore([1.0] * 100)
    assert never.limit() == math.inf


def test_a_loss_far_above_those_before_stops_the_run_before_any_weight_changes():
    trainer = tiny_trainer(tiny_config("training.stop_above=1.5"))
    trainer.watch.restore([0.01] * 50)
    before = [p.clone() for p in trainer.trainable.values()]
    with pytest.raises(TrainingDiverged, match=r"at step 1, above 0\.015 = training\.stop_above times the median") as info:
        trainer.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.trainable.values()))
    assert not any(p.grad is not None and p.grad.any() for p in trainer.trainable.values())
    assert info.value.report["batch_indices"] == trainer.task.batches.indices(1).tolist()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_whatever_its_gradient(loss):
    """Also while there are too few losses for a limit."""
    trainer = tiny_trainer(tiny_config())
    assert trainer.watch.limit() == math.inf
    with pytest.raises(TrainingDiverged, match=f"loss {loss}, gradient norm 1.0 at step 1$"):
        trainer._check(1, loss, 1.0, 0.1)
    trainer._check(1, 1e9, 1.0, 0.1)


@pytest.fixture
def bad_noise(monkeypatch):
    """Step 4 is not finite with the run's first noise."""
    backward = Trainer._backward_part

    def part(self, step, *arguments):
        loss = backward(self, step, *arguments)
        return loss * torch.nan if step == 4 and self.rollbacks in bad else loss

    bad = {0}
    monkeypatch.setattr(Trainer, "_backward_part", part)
    return bad


def test_a_diverged_run_leaves_a_report(tmp_path, bad_noise, capfd):
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: training stopped after step 3, loss nan, gradient norm")
    assert f"last good checkpoint: {tmp_path}/diffusion-2.safetensors" in line
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert (report["step"], len(report["losses_before"]), len(report["batch_indices"])) == (4, 3, 4)
    assert report["losses_before"] == [m["loss"] for m in read_metrics(tmp_path / "metrics.jsonl")]
    assert report["loss"] == "nan"


def test_a_sole_checkpoint_whose_next_step_diverged_is_not_called_good(tmp_path, bad_noise, capfd):
    words = ["--save_and_sample_every_n", 3, "--output_path", tmp_path]
    assert run_script(TRAIN, *COMMON, *words) == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"last good checkpoint: none for sure, as the step after {tmp_path}/diffusion-3.safetensors, the only one" in line
    assert "to try it with other noise: python " in line and "--resume_from auto" in line


def test_a_diverged_run_goes_back_and_on_with_other_noise(tmp_path, bad_noise):
    words = [*COMMON, "--set", "training.rollbacks=1", "--output_path"]
    assert run_script(TRAIN, *words, tmp_path / "run") == 0
    steps = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    bad_noise.clear()
    assert run_script(TRAIN, *words, tmp_path / "straight") == 0
    straight = [m["loss"] for m in read_metrics(tmp_path / "straight" / "metrics.jsonl")]
    assert [m["loss"] for m in steps][:2] == straight[:2]
    assert [m["loss"] for m in steps][2] != straight[2]


def test_a_run_that_diverges_more_often_than_it_may_stops(tmp_path, bad_noise):
    bad_noise |= {1}
    assert run_script(TRAIN, *COMMON, "--set", "training.rollbacks=1", "--output_path", tmp_path / "once") == 1
    assert run_script(TRAIN, *COMMON, "--set", "training.rollbacks=2", "--output_path", tmp_path / "twice") == 0
    assert [s["status"] for s in read_run(tmp_path / "twice")["segments"]] == ["finished"]
    assert read_run(tmp_path / "twice")["segments"][0]["rollbacks"] == 2 * [{"diverged": 4, "to": 2}]
    reports = [json.loads((tmp_path / "twice" / name).read_text()) for name in ("diverged.json", "diverged-1.json")]
    assert [report["rollbacks"] for report in reports] == [0, 1]


def test_a_checkpoint_from_which_a_run_diverges_again_is_not_good(tmp_path, monkeypatch):
    """It is left behind for the one before, and its state is renamed: a later resume does not choose it."""
    backward = Trainer._backward_part

    def part(self, step, *arguments):
        loss = backward(self, step, *arguments)
        return loss * torch.nan if step == 6 and self.rollbacks < 2 else loss

    monkeypatch.setattr(Trainer, "_backward_part", part)
    words = [*COMMON, "--num_training_steps", 6, "--set", "training.rollbacks=2", "--output_path", tmp_path]
    assert run_script(TRAIN, *words) == 0
    (segment,) = read_run(tmp_path)["segments"]
    assert segment["rollbacks"] == [{"diverged": 6, "to": 4}, {"diverged": 6, "to": 2}]
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 7))


@pytest.fixture
def exploding_update(monkeypatch):
    """The update of step 4 leaves weights of a finite size that no loss is finite with, unless the noise is another one."""
    step_of = Trainer.step

    def step(self, number):
        metrics = step_of(self, number)
        if number == 4 and not self.rollbacks:
            for weights in self.packed.updated:
                weights.data.fill_(1e30)
        return metrics

    monkeypatch.setattr(Trainer, "step", step)


def test_weights_whose_next_loss_is_not_finite_are_no_good_checkpoint(tmp_path, exploding_update, capfd):
    """Nor does the rotation delete the one before them until that loss is known."""
    words = [*COMMON, "--output_path", tmp_path, "--set", "checkpoints.keep_last=1"]
    assert run_script(TRAIN, *words, "--set", "training.rollbacks=1") == 0
    assert f"{tmp_path}/diffusion-4.safetensors is not good" in capfd.readouterr().err
    (segment,) = read_run(tmp_path)["segments"]
    assert segment["rollbacks"] == [{"diverged": 5, "to": 2}]
    left = {path.name for path in tmp_path.glob("diffusion-*")}
    assert left == {f"diffusion-{STEPS}.safetensors", f"diffusion-{STEPS}.state.pt"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path, exploding_update, monkeypatch, capfd):
    """No loss shows what the last update of a run has done."""
    last = ["--num_training_steps", 4, "--output_path"]
    fill = torch.Tensor.fill_
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: fill(self, math.inf if value == 1e30 else value))
    assert run_script(TRAIN, *COMMON, *last, tmp_path / "stops") == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert "after step 4, weights that are not finite after step 4, learning rate" in line
    assert f"last good checkpoint: {tmp_path}/stops/diffusion-2.safetensors; to go on" in line
    assert json.loads((tmp_path / "stops/diverged.json").read_text())["step"] == 4
    assert not [*(tmp_path / "stops").glob("diffusion-4*")]
    assert run_script(TRAIN, *COMMON, *last, tmp_path / "goes_back", "--set", "training.rollbacks=1") == 0
    assert (tmp_path / "goes_back/diffusion-4.safetensors").is_file()


def test_a_resume_after_a_divergence_begins_before_the_weights_that_gave_the_loss(tmp_path, exploding_update, capfd):
    words = [*COMMON, "--output_path", tmp_path, "--set", "checkpoints.keep_last=1", "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 1
    assert f"last good checkpoint: {tmp_path}/diffusion-2.safetensors; to go on" in capfd.readouterr().err
    assert run_script(TRAIN, *words) == 0
    assert "going on with step 3" in capfd.readouterr().out


def test_resuming_a_diverged_run_draws_other_noise(tmp_path, bad_noise, capfd):
    """The command that the error names would else diverge at the same step again."""
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 1
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path, "--resume_from", "auto") == 0
    assert "the run diverged after this step before: going on with other noise" in capfd.readouterr().out
    assert [s["status"] for s in read_run(tmp_path)["segments"]] == ["diverged", "finished"]


def test_every_resume_of_a_run_that_diverges_again_draws_noise_of_its_own(tmp_path, bad_noise):
    bad_noise |= {1, 2}
    words = [*COMMON, "--output_path", tmp_path, "--resume_from", "auto"]
    assert [run_script(TRAIN, *words) for _ in range(4)] == [1, 1, 1, 0]
    segments = [(s["status"], s["noise"]) for s in read_run(tmp_path)["segments"]]
    assert segments == [("diverged", 0), ("diverged", 1), ("diverged", 2), ("finished", 3)]


def test_a_kill_does_not_undo_the_choice_of_other_noise(tmp_path, bad_noise, monkeypatch):
    """Neither one that a resume has made, nor one of a run that went back, before the next checkpoint."""

    class Killed(BaseException):
        pass

    def killed(self, *_):
        raise Killed

    words = [*COMMON, "--output_path", tmp_path, "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Records, "step", killed)
        run_script(TRAIN, *words)
    bad_noise |= {1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Records, "go_back", killed)
        run_script(TRAIN, *words, "--set", "training.rollbacks=2")
    assert run_script(TRAIN, *words) == 0
    segments = [(s["status"], s["noise"]) for s in read_run(tmp_path)["segments"]]
    assert segments == [("diverged", 0), ("running", 1), ("running", 2), ("finished", 2)]


def test_an_explosion_stops_a_run_by_default():
    trainer = tiny_trainer(tiny_config())
    trainer.watch.restore([1e-6] * 50)
    with pytest.raises(TrainingDiverged, match=r"above 0.001 = training.stop_above times the median"):
        trainer.step(1)
