"""The judge: what it learns, and how it is kept."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import copies, equal_bits, tiny_images

from xdiffusion import scoring
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.data.image_set import ImageSet, Split
from xdiffusion.evaluation.judge import Judge, accuracy, judge_features, train_judge
from xdiffusion.scoring import cached_judge


@pytest.fixture(scope="module")
def judged():
    data = tiny_images(train=200, test=60)
    return data, train_judge(data.train.floats, data.train.labels, 10, steps=150, batch_size=20)


def test_a_judge_learns_and_is_frozen(judged):
    data, judge = judged
    assert accuracy(judge, data.test.floats(), data.test.labels) > 0.9
    assert accuracy(judge, -data.test.floats(), data.test.labels) < 0.5  # it must not see inverted images
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())


def test_accuracy_and_features_do_not_depend_on_blocks(judged):
    data, judge = judged
    images, labels = data.test.floats().repeat(10, 1, 1, 1), data.test.labels.repeat(10)  # 600, above a block of 512
    one_by_one = [judge(x[None]).argmax().item() for x in data.test.floats()]
    expected = np.mean([guess == label for guess, label in zip(one_by_one, data.test.labels.tolist())])
    assert accuracy(judge, images, labels) == pytest.approx(expected)
    features = judge_features(judge, images)
    assert features.shape == (600, Judge.FEATURES)
    torch.testing.assert_close(features[:60], features[-60:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.head(features[:60]), judge(data.test.floats()), rtol=1e-4, atol=1e-5)


def test_training_a_judge_is_a_function_of_its_seed():
    data = tiny_images()
    judges = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        judges.append(train_judge(data.train.floats, data.train.labels, 10, steps=3, batch_size=16, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb other draws
    first, second, other = (judge.state_dict() for judge in judges)
    assert equal_bits(first, second)
    assert not equal_bits(first, other)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 33)])
def test_judges_of_other_shapes(channels, size):
    judge = Judge(channels, size, 4).eval()
    assert judge(torch.zeros(2, channels, size, size)).shape == (2, 4)


@pytest.fixture
def quick_judge(monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", partial(train_judge, steps=3, batch_size=20))


def test_a_judge_is_kept_and_read_again(quick_judge, tmp_path, monkeypatch):
    """Trained on the images for training, and judged by those that are held out."""
    data, taught, train = tiny_images(), [], scoring.train_judge
    monkeypatch.setattr(scoring, "train_judge", lambda *given: taught.append(given) or train(*given))
    judge, held_out = cached_judge(data, tmp_path)
    ((images, labels, classes),) = taught
    assert torch.equal(images(), data.train.floats()) and torch.equal(labels, data.train.labels)
    assert classes == data.prompts.num_classes
    assert held_out == accuracy(judge, data.test.floats(), data.test.labels)
    (file,) = tmp_path.glob("image/digits/judge_12px_*.safetensors")

    monkeypatch.setattr(scoring, "train_judge", None)  # a second training would fail
    again, again_held_out = cached_judge(data, tmp_path)
    assert equal_bits(again.state_dict(), copies(judge.state_dict()))
    assert torch.equal(again(data.test.floats()), judge(data.test.floats()))
    assert again_held_out == pytest.approx(held_out, abs=1e-5)
    assert not again.training
    assert [file] == list(tmp_path.glob("image/digits/*"))


def test_a_folder_that_takes_no_judge_is_said_before_one_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", None)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write to .*file.image.digits"):
        cached_judge(tiny_images(), tmp_path / "file")


def test_other_data_has_another_judge(quick_judge, tmp_path):
    data = tiny_images()
    relabelled = ImageSet(data.name, Split(data.train.images, data.train.labels.flip(0)), data.test, data.prompts)
    for images in (data, tiny_images(seed=1), relabelled):
        cached_judge(images, tmp_path)
    assert len(list(tmp_path.glob("image/digits/judge_12px_*.safetensors"))) == 3


def test_a_kept_judge_is_as_good_as_on_the_images_that_are_held_out_now(quick_judge, tmp_path):
    data = tiny_images()
    judge, accuracy_there = cached_judge(data, tmp_path)
    verdicts = judge(data.test.floats()).argmax(1)
    _, accuracy_here = cached_judge(replace(data, test=replace(data.test, labels=verdicts)), tmp_path)
    assert accuracy_here == 1 > accuracy_there


def test_a_kept_judge_that_is_none_is_named(quick_judge, tmp_path):
    cached_judge(tiny_images(), tmp_path)
    (file,) = tmp_path.glob("image/digits/*")
    save_safetensors(file, {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=f"{file.name} is no judge"):
        cached_judge(tiny_images(), tmp_path)
