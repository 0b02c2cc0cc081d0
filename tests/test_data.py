"""The image sets: where their pixels come from, how they are split, resized, inverted and captioned."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits as sklearn_digits
from tiny import label_of

from xdiffusion.data import digits, image_set
from xdiffusion.data.captions import PROMPT_TABLES
from xdiffusion.data.digits import load_digits
from xdiffusion.data.image_set import ImageSet, Split, invert, to_uint8, to_unit_range


def equal_sets(a: ImageSet, b: ImageSet) -> bool:
    pairs = [(getattr(a, s), getattr(b, s)) for s in ("train", "test")]
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)


# --- image/digits ---


def test_the_embedded_digits_are_scikit_learns():
    source = sklearn_digits()
    with np.load(digits.files("xdiffusion.data") / "digits.npz") as arrays:
        assert np.array_equal(arrays["images"], source.images)
        assert np.array_equal(arrays["labels"], source.target)


@pytest.mark.parametrize("image_size", [8, 13, 24, 32])
def test_digits_at_any_size(image_size):
    data = load_digits(image_size)
    for split, count in ((data.train, 11_200), (data.test, 3_176)):
        assert split.images.shape == (count, 1, image_size, image_size)
        assert split.images.dtype == torch.uint8
        assert split.labels.shape == (count,)
        assert split.labels.dtype == torch.int64
        assert len(split) == count
        assert sorted(set(split.labels.tolist())) == list(range(10))
    assert (data.name, data.image_size, data.channels, data.inverted) == ("image/digits", image_size, 1, False)


def test_digits_are_drawn_in_blocks_and_no_block_changes_them(monkeypatch):
    whole, sizes = load_digits(12), []
    sample = F.grid_sample
    monkeypatch.setattr(image_set, "BLOCK_PIXELS", 10_000)
    monkeypatch.setattr(F, "grid_sample", lambda images, grid, **how: sizes.append(len(grid)) or sample(images, grid, **how))
    assert equal_sets(load_digits(12), whole)
    assert max(sizes) == 10_000 // 12**2 and sum(sizes) == 14_376


def test_a_set_that_no_memory_is_for_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(digits, "_draw", lambda *given: pytest.fail("drawn"))
    message = "image_size=547: 14,376 images of image/digits take 4,301,428,584 bytes in memory; allowed are 4,294,967,296"
    with pytest.raises(ValueError, match=message):
        load_digits(547)


def test_digits_are_the_same_every_time_whatever_the_global_seed():
    torch.manual_seed(1)
    first = load_digits(12)
    torch.manual_seed(2)
    assert equal_sets(first, load_digits(12))


def test_no_held_out_digit_is_a_moved_copy_of_a_training_digit(monkeypatch):
    def numbered(source, size, generator):
        """Instead of a drawing, the number of the source digit in the first two pixels."""
        images = torch.zeros(len(source), 1, size, size, dtype=torch.uint8)
        index = torch.arange(len(source))
        images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 256, index // 256
        return images

    monkeypatch.setattr(digits, "_draw", numbered)
    data = load_digits(8)
    target = torch.from_numpy(sklearn_digits().target)
    sources = {}
    for name, split in (("train", data.train), ("test", data.test)):
        number = split.images[:, 0, 0, 0].long() + 256 * split.images[:, 0, 0, 1].long()
        assert torch.equal(split.labels, target[number])
        sources[name] = set(number.tolist())
        assert torch.equal(number.bincount()[number], torch.full_like(number, digits.VARIANTS))
        assert torch.equal(number[:, None] == number, split.groups[:, None] == split.groups)
    assert sources["train"] & sources["test"] == set()
    assert sources["train"] | sources["test"] == set(range(1797))


def test_drawn_digits_look_like_their_sources():
    """Upright, in place, white on black: each class's mean drawing is nearest to that class's mean source."""
    source = sklearn_digits()
    means = torch.stack([torch.from_numpy(source.images[source.target == k].mean(0)).float() for k in range(10)])
    framed = F.pad(F.interpolate(means[:, None], size=20, mode="bilinear"), (2, 2, 2, 2)).flatten(1)
    data = load_digits(24)
    drawn = torch.stack([data.test.images[data.test.labels == k].float().mean(0) for k in range(10)]).flatten(1)
    likeness = torch.corrcoef(torch.cat([framed, drawn]))[:10, 10:]
    assert torch.equal(likeness.argmax(0), torch.arange(10))
    assert likeness.diag().min() > 0.85
    assert (data.train.images[:, 0, 0, 0] == 0).all()
    assert data.train.images.max() == 255


def test_a_digit_comes_in_different_variants():
    images = load_digits(16).train.images.float().unflatten(0, (digits.VARIANTS, -1))
    difference = (images[1:] - images[0]).abs().flatten(2).mean(-1)
    assert (difference > 1).float().mean() > 0.99
    assert (difference < 64).all()


def test_digits_have_a_smallest_size():
    with pytest.raises(ValueError, match="image_size=7 must be at least 8 for image/digits"):
        load_digits(7)


# --- ranges, inversion, batches ---


def test_ranges_are_inverse_to_each_other():
    levels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    floats = to_unit_range(levels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert floats.dtype == torch.float32
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)).flatten(),
                       torch.tensor([0, 0, 128, 255, 255], dtype=torch.uint8))  # fmt: skip


def test_scaling_leaves_its_argument_alone():
    floats = torch.rand(1, 1, 4, 4)
    before = floats.clone()
    to_uint8(floats)
    assert torch.equal(floats, before)


@pytest.fixture(scope="module")
def small():
    """Three colour images of two classes and one held-out image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 5, 5), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])
    return ImageSet("image/x", Split(images[:3], labels[:3]), Split(images[3:], labels[3:]), PROMPT_TABLES["image/mnist"])


def test_inversion_is_the_negative_and_undoes_itself(small):
    negative = invert(small)
    assert (negative.name, negative.inverted) == ("image/x_inverted", True)
    torch.testing.assert_close(negative.train.floats(), -small.train.floats(), atol=1e-6, rtol=0)
    assert torch.equal(negative.test.images, 255 - small.test.images)
    assert torch.equal(negative.train.labels, small.train.labels)
    assert negative.prompts is small.prompts
    again = invert(negative)
    assert (again.name, again.inverted) == ("image/x", False)
    assert equal_sets(again, small)


def test_a_group_is_an_image_with_its_variants_also_among_negatives(small):
    assert small.train.groups.tolist() == [0, 1, 2]
    assert invert(load_digits(8)).test.groups.bincount().tolist() == [8] * 397


def test_a_batch_is_an_index_into_the_training_split(small):
    batch = small.batch(torch.tensor([2, 0]), torch.tensor([0.0, 0.999]))
    torch.testing.assert_close(batch.images, small.train.images[[2, 0]].float() / 127.5 - 1, atol=1e-6, rtol=0)
    assert batch.labels.tolist() == [1, 0]
    assert batch.captions == ["1", "a handwritten zero"]


# --- captions ---


@pytest.mark.parametrize("name", PROMPT_TABLES)
def test_no_caption_names_two_classes(name):
    table = PROMPT_TABLES[name]
    captions = [caption for of_class in table.captions for caption in of_class]
    assert len(table.captions) == table.num_classes == 10
    assert len(set(captions)) == len(captions)
    assert "" not in captions  # the unconditional prompt
    for label, of_class in enumerate(table.captions):
        assert of_class[0] == table.names[label][0]  # the plainest first


def test_digit_captions_are_names_in_templates():
    assert PROMPT_TABLES["image/digits"].captions[3] == (
        "3", "the digit 3", "a handwritten 3", "three", "the digit three", "a handwritten three",
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(label=st.integers(0, 9), u=st.floats(0, 1, exclude_max=True, width=32))
def test_any_wording_names_the_class(label, u):
    for table in PROMPT_TABLES.values():
        [caption] = table.choose(torch.tensor([label]), torch.tensor([u]))
        assert label_of(table, caption) == label


def test_wordings_are_equally_likely():
    table = PROMPT_TABLES["image/digits"]
    drawn = table.choose(torch.zeros(600, dtype=torch.long), (torch.arange(600) + 0.5) / 600)
    assert [drawn.count(caption) for caption in table.captions[0]] == [100] * 6
