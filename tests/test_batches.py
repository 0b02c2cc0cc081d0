"""What a step trains on: parts of a batch, latents drawn from their posterior, and class images beside the subject."""

import pytest
import torch
from picture_folders import write_pictures
from tiny import tiny_images

from xdiffusion.data.image_folder import load_image_folder
from xdiffusion.training.batches import Batches, Source
from xdiffusion.training.randomness import generator_at
from xdiffusion.training.settings import TrainingSettings


def certain(images):
    return images, None


def settings(**given):
    return TrainingSettings(**{"batch_size": 4, "caption_dropout": 0.0} | given)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16), (24, 16), (16, 16)], ["a", "b", "c"])
    return tmp_path


def load(folder, **given):
    return load_image_folder(16, str(folder), bucket_multiple=4, **given)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_rows_of_one_batch(folder, parts):
    def whole_and_parts(sources, posterior):
        batches = Batches(sources, posterior, settings(caption_dropout=0.5))
        return batches.part(3, 0, 1), [batches.part(3, k, parts) for k in range(parts)]

    moving = load(folder / "set", random_crop=True, flip=True)
    for sources in ([Source(tiny_images())], [Source(moving)], [Source(moving), Source(moving, weight=0.5)]):
        whole, cut = whole_and_parts(sources, lambda x: (x, torch.ones_like(x)))
        assert torch.equal(torch.cat([part.x0 for part in cut]), whole.x0)
        assert [caption for part in cut for caption in part.captions] == whole.captions
        if whole.weights is not None:
            assert torch.equal(torch.cat([part.weights for part in cut]), whole.weights)


def test_images_in_memory_come_as_before():
    data = tiny_images()
    part = Batches([Source(data)], certain, settings(caption_dropout=0.5)).part(2, 0, 1)
    wording, dropped = torch.rand(2, 4, generator=generator_at(0, "captions", 2))
    order = torch.randperm(60, generator=generator_at(0, "order", 0))[4:8]
    expected = data.batch(order, wording)
    assert torch.equal(part.x0, expected.images) and part.weights is None
    assert part.captions == ["" if d < 0.5 else c for c, d in zip(expected.captions, dropped)]


def test_latents_are_drawn_from_their_posterior(folder):
    images = load(folder / "set")
    mean = Batches([Source(images)], lambda x: (x, torch.zeros_like(x)), settings()).part(1, 0, 1).x0
    drawn = Batches([Source(images)], lambda x: (x, torch.full_like(x, 0.1)), settings()).part(1, 0, 1).x0
    noise = (drawn - mean) / 0.1
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    again = Batches([Source(images)], lambda x: (x, torch.full_like(x, 0.1)), settings()).part(1, 0, 1).x0
    assert torch.equal(again, drawn)


def test_class_images_are_half_of_a_batch_in_the_subject_s_shape(folder):
    write_pictures(folder / "class", [(20, 20), (20, 40)], seed=1)
    subject, of_class = load(folder / "set"), load(folder / "class", captions=["class"])
    batches = Batches([Source(subject), Source(of_class, weight=0.25)], certain, settings())
    for step in range(1, 6):
        part = batches.part(step, 0, 1)
        assert part.x0.shape[2:] == subject.sizes[int(batches.indices(step)[0])]
        assert part.captions[1::2] == ["class"] * 2 and "class" not in part.captions[::2]
        assert part.weights.tolist() == pytest.approx([1.6, 0.4] * 2)  # 1 and 1/4, with mean 1
