"""Rows of a batch on threads: the same gradient as in one piece, the same bits every time, and only where rows are apart."""

import pytest
import torch
from tiny import copies, equal_bits, tiny_config, tiny_images, tiny_model, tiny_trainer

from xdiffusion.lora.inject import apply_lora_to_model
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.row_threads import RowThreads, shares_of_a_step

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients_of_a_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer._backward_part(1, 0, 1)
    return copies({name: p.grad for name, p in trainer.trainable.items() if p.grad is not None})


def test_the_shares_add_up_to_the_whole_gradient():
    torch.manual_seed(0)
    x, weight, unused = torch.randn(6, 3), torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.ones(2))
    threads = RowThreads([weight, unused], 3)
    weight.grad = torch.ones(3)  # of an earlier accumulation part
    total = threads.backward(lambda i: (x[2 * i : 2 * i + 2] @ weight).square().sum() / 6)
    assert torch.allclose(total, (x @ weight).square().mean())
    assert torch.allclose(weight.grad, 1 + 2 * x.T @ (x @ weight.detach()) / 6)
    assert unused.grad is None and not total.requires_grad


def test_a_parameter_that_only_some_shares_reach_has_their_gradient():
    """A text encoder's, say, where all captions of the other share are dropped."""
    of_first, of_last = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    threads = RowThreads([of_first, of_last], 2)
    threads.backward(lambda i: (of_last if i else of_first).sum() * (3.0 + i))
    assert torch.equal(of_first.grad, torch.full((2,), 3.0))
    assert torch.equal(of_last.grad, torch.full((2,), 4.0))


def test_a_gradient_that_the_first_share_does_not_reach_is_laid_out_as_its_parameter_too():
    x, of_first, matrix = torch.randn(3, 2), torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2, 3))
    RowThreads([of_first, matrix], 2).backward(lambda i: (matrix.T * x).sum() if i else of_first.sum())
    assert torch.equal(matrix.grad, x.T) and matrix.grad.stride() == matrix.stride() != x.T.stride()


@pytest.mark.parametrize(("threads", "shares"), [(1, 1), (3, 3), (5, 4), (12, 4)])
def test_there_are_no_more_shares_than_threads_nor_than_four(two_threads, threads, shares):
    torch.set_num_threads(threads)
    config = tiny_config("training.batch_size=12")
    assert shares_of_a_step(DiffusionTask(tiny_model(config), tiny_images(), config), CPU, 1) == shares


def test_a_share_has_its_part_of_the_cores(two_threads):
    seen, weight = [], torch.nn.Parameter(torch.ones(1))
    RowThreads([weight], 2).backward(lambda i: seen.append(torch.get_num_threads()) or weight.sum())
    assert seen == [1, 1] and torch.get_num_threads() == 2


def test_a_share_that_fails_fails_the_step():
    threads = RowThreads([torch.nn.Parameter(torch.ones(1))], 2)
    with pytest.raises(ZeroDivisionError):
        threads.backward(lambda i: torch.ones(1) / (1 // i))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
def test_a_training_step_on_threads_is_that_in_one_piece(two_threads, lora, accumulated):
    config = tiny_config(f"training.gradient_accumulation_steps={accumulated}", "training.caption_dropout=0.5")
    trainers = [tiny_trainer(config, lora=lora) for _ in range(3)]
    assert trainers[0].row_threads.shares == 2
    trainers[2].row_threads = None
    gradients = [gradients_of_a_step(trainer) for trainer in trainers]
    assert equal_bits(gradients[0], gradients[1])
    assert gradients[0].keys() == gradients[2].keys()
    for name, whole in gradients[2].items():
        assert torch.allclose(gradients[0][name], whole, rtol=1e-3, atol=1e-6), name
    losses = [[trainer.step(step).loss for step in (1, 2, 3)] for trainer in trainers]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    assert torch.get_num_threads() == 2  # those of the threads are their own


def test_a_gradient_lies_in_memory_as_its_parameter_does(two_threads):
    """The fused AdamW goes through both by address; a convolution's gradient comes channels_last, its A is not."""
    trainer = tiny_trainer(tiny_config("lora.target_modules=all"), lora=True)
    trainer._backward_part(1, 0, 1)
    convolutions = [p for p in trainer.trainable.values() if p.dim() == 4 and p.shape[-1] > 1]
    assert convolutions and all(p.grad.stride() == p.stride() for p in trainer.trainable.values())


@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_after_some_steps_are_those_without_threads(two_threads, lora):
    """Right gradients are not enough: the optimizer must read them as they are meant, in convolutions too."""
    config = tiny_config("lora.target_modules=all", "training.num_training_steps=8")
    before, ends = None, []
    for threaded in (True, False):
        trainer = tiny_trainer(config, lora=lora)
        if lora:
            for name, parameter in trainer.trainable.items():
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        before = copies(trainer.trainable)
        if not threaded:
            trainer.row_threads = None
        for step in range(1, 9):
            trainer.step(step)
        ends.append(copies(trainer.trainable))
    for name, start in before.items():
        moved = (ends[1][name] - start).norm()
        assert (ends[0][name] - ends[1][name]).norm() < 0.05 * moved, name


def test_the_step_takes_no_more_cores_beside_its_threads_than_one_of_them(two_threads, monkeypatch):
    """OpenMP's team of the main thread would spin on the cores of the others."""
    trainer, seen = tiny_trainer(tiny_config()), []
    monkeypatch.setattr(trainer.ema, "update", lambda step: seen.append(torch.get_num_threads()))
    trainer.step(1)
    assert seen == [1] and torch.get_num_threads() == 2
    trainer.row_threads = None
    trainer.step(2)
    assert seen == [1, 2]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init": "pissa"}, {"use_rslora": True}], ids=str)
def test_every_kind_of_adapter_has_the_gradient_of_one_piece(two_threads, settings):
    gradients = []
    for threaded in (True, False):
        model = tiny_model(tiny_config()).requires_grad_(False)
        apply_lora_to_model(model.network, rank=2, target_modules=["to_q", "to_out", "conv1"], **settings)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.05)
        trainer = Trainer(DiffusionTask(model, tiny_images(), tiny_config()), force_cpu=True)
        assert trainer.row_threads.layers
        if not threaded:
            trainer.row_threads = None
        gradients.append(gradients_of_a_step(trainer))
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[1].items():
        assert torch.allclose(gradients[0][name], whole, rtol=2e-3, atol=1e-4 * float(whole.abs().max())), name


def test_a_trained_text_encoder_gets_its_gradient_from_all_rows(two_threads):
    config = tiny_config()
    gradients = []
    for threaded in (True, False):
        model = tiny_model(config).requires_grad_(False)
        apply_lora_to_model(model.text_encoder, rank=2)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.1)
        trainer = Trainer(DiffusionTask(model, tiny_images(), config), force_cpu=True)
        assert trainer.row_threads is not None
        if not threaded:
            trainer.row_threads = None
        gradients.append(gradients_of_a_step(trainer))
    assert all(torch.allclose(gradients[0][n], g, rtol=1e-3, atol=1e-6) for n, g in gradients[1].items())
    assert any(g.abs().max() > 0 for g in gradients[1].values())


@pytest.mark.parametrize(
    "settings, processes, device, shares",
    [
        ({}, 1, CPU, 2),
        ({"batch_size": 7}, 1, CPU, 1),
        ({"batch_size": 6, "gradient_accumulation_steps": 2}, 1, CPU, 1),
        ({"gradient_checkpointing": True}, 1, CPU, 1),
        ({"compile": True}, 1, CPU, 1),
        ({}, 2, CPU, 1),
        ({}, 1, torch.device("cuda"), 1),
    ],
)
def test_only_rows_that_are_apart_are_dealt_out(two_threads, settings, processes, device, shares):
    config = tiny_config(*(f"training.{key}={value}" for key, value in settings.items()))
    task = DiffusionTask(tiny_model(config), tiny_images(), config)
    assert shares_of_a_step(task, device, processes) == shares


def test_dropout_keeps_the_rows_together(two_threads):
    task = DiffusionTask(tiny_model(tiny_config()), tiny_images(), tiny_config())
    assert shares_of_a_step(task, CPU, 1) == 2
    apply_lora_to_model(task.model.network, rank=2, dropout=0.1)
    assert shares_of_a_step(task, CPU, 1) == 1
