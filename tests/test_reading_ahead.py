"""Reading ahead: the same batches, bit for bit, as those that are read when they are asked for."""

from threading import Event, get_ident

import pytest
import torch
from picture_folders import write_pictures
from tiny import tiny_config, tiny_images, tiny_model

from xdiffusion.data.image_folder import load_image_folder
from xdiffusion.training.batches import Batches, Source
from xdiffusion.training.diffusion_task import DiffusionTask
from xdiffusion.training.loop import Trainer
from xdiffusion.training.reading_ahead import ReadAhead
from xdiffusion.training.settings import TrainingSettings


def test_the_next_step_is_read_while_nobody_asks():
    begun, threads, asked = {step: Event() for step in range(1, 6)}, set(), []

    def read(step, part, parts):
        threads.add(get_ident())
        asked.append((step, part, parts))
        begun[step].set()
        return step * 10 + part

    ahead = ReadAhead(read)
    assert ahead(1, 0, 2) == 10
    assert begun[2].wait(5)
    assert [ahead(1, 1, 2), ahead(2, 0, 2), ahead(2, 1, 2), ahead(4, 0, 1), ahead(1, 0, 2)] == [11, 20, 21, 40, 10]
    assert begun[5].wait(5)
    assert get_ident() not in threads and len(threads) == 1
    assert asked[:4] == [(1, 0, 2), (2, 0, 2), (1, 1, 2), (2, 1, 2)]


def test_what_reading_raises_is_raised_where_it_is_asked_for():
    def read(step, part, parts):
        if step == 2:
            raise OSError("gone")
        return step

    ahead = ReadAhead(read)
    assert ahead(1, 0, 1) == 1
    with pytest.raises(OSError, match="gone"):
        ahead(2, 0, 1)


def test_only_what_is_decoded_is_read_ahead(tmp_path):
    write_pictures(tmp_path, [(12, 12)] * 2, ["a", "b"])
    settings = TrainingSettings(batch_size=4)
    pictures = load_image_folder(12, str(tmp_path), bucket_multiple=4)
    for data, ahead in ((tiny_images(), False), (pictures, True)):
        assert isinstance(Batches([Source(data)], lambda x: (x, None), settings).read, ReadAhead) == ahead


@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_has_the_same_bits(tmp_path, accumulated):
    write_pictures(tmp_path, [(12, 12), (20, 12), (12, 20), (14, 13)], ["a", "b", "c", "d"])
    data = load_image_folder(12, str(tmp_path), bucket_multiple=4, random_crop=True, flip=True)
    changes = ["data.kind=image/folder", "training.batch_size=4", f"training.gradient_accumulation_steps={accumulated}"]
    config = tiny_config(*changes, "training.caption_dropout=0.5", "training.num_training_steps=6")
    losses, weights = [], []
    for ahead in (True, False):
        trainer = Trainer(DiffusionTask(tiny_model(config), data, config), force_cpu=True)
        if not ahead:
            trainer.task.batches.read = trainer.task.batches._read
        losses.append([trainer.step(step).loss for step in range(1, 7)])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.trainable.values()]))
    assert losses[0] == losses[1]
    assert torch.equal(*weights)
