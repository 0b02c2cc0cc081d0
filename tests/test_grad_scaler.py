"""fp16's gradient scaler in a run: what is logged, skipped and resumed. A scaler on the CPU stands for that of a GPU."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from test_state import fresh, train
from tiny import copies, equal_bits, tiny_config, tiny_images, tiny_model

from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.divergence import MOST_SKIPPED, TrainingDiverged
from xdiffusion.training.loop import Trainer


def scaled(folder, monkeypatch, scale=2.0**10):
    trainer, files = fresh(folder)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, device_placement=False, scaler=scaler)
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler
    trainer.accelerator._optimizers = [trainer.optimizer]
    monkeypatch.setattr(trainer.accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    return trainer, files


def test_a_second_run_in_a_process_has_a_precision_of_its_own():
    for precision in ("no", "bf16", "no"):
        config = tiny_config(f"training.mixed_precision={precision}")
        trainer = Trainer(DiffusionTask(tiny_model(config), tiny_images(), config), force_cpu=True)
        assert trainer.accelerator.mixed_precision == precision


def test_an_overflow_is_skipped_and_logged(tmp_path, monkeypatch):
    trainer, _ = scaled(tmp_path, monkeypatch)
    hook = trainer.model.network.conv_in.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copies(trainer.trainable)
    metrics = trainer.step(1)
    assert (metrics.skipped, metrics.loss_scale) == (True, 2.0**9)
    assert equal_bits(trainer.trainable, before)
    hook.remove()
    assert [(m.skipped, m.loss_scale) for m in map(trainer.step, (2, 3))] == [(False, 2.0**9), (False, 2.0**10)]
    assert not equal_bits(trainer.trainable, before)


def test_gradients_that_are_never_finite_stop_the_run(tmp_path, monkeypatch):
    """And again after it went back; a step with finite ones between begins the count anew."""
    trainer, _ = scaled(tmp_path, monkeypatch)
    weight = trainer.model.network.conv_in.weight
    hook = weight.register_hook(lambda gradient: gradient * torch.inf)
    before = copies(trainer.trainable)
    for _ in range(2):
        assert all(trainer.step(1).skipped for _ in range(MOST_SKIPPED - 1))
        with pytest.raises(TrainingDiverged, match=f"of {MOST_SKIPPED} steps in a row whose gradients overflow in fp16"):
            trainer.step(1)
    assert equal_bits(trainer.trainable, before)
    for _ in range(2):
        for _ in range(MOST_SKIPPED - 1):
            trainer.step(1)
        hook.remove()
        assert not trainer.step(1).skipped
        hook = weight.register_hook(lambda gradient: gradient * torch.inf)


def test_the_scaler_is_resumed(tmp_path, monkeypatch):
    whole, files = scaled(tmp_path / "whole", monkeypatch)
    expected = train(whole, files)
    first, files = scaled(tmp_path / "cut", monkeypatch)
    losses = train(first, files, stop_after=3)
    second, files = scaled(tmp_path / "cut", monkeypatch, scale=3.0)
    assert files.resume(second, "auto") == 2
    assert losses[:2] + train(second, files, first_step=3) == expected
    assert second.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert equal_bits(second.trainable, whole.trainable)


def test_a_run_that_diverged_can_step_again(tmp_path, monkeypatch):
    """The step that was given up had unscaled its gradients already."""
    trainer, files = scaled(tmp_path, monkeypatch)
    train(trainer, files, stop_after=3)
    with monkeypatch.context() as patch:
        backward = trainer._backward_part
        patch.setattr(trainer, "_backward_part", lambda *step: backward(*step) * torch.nan)
        with pytest.raises(TrainingDiverged):
            trainer.step(4)
    files.resume(trainer, "auto")
    assert trainer.step(3).step == 3
