"""The distance that real images have: whose classes are in which numbers decides most of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from xdiffusion import scoring
from xdiffusion.evaluation.frechet import frechet_distance
from xdiffusion.evaluation.judge import Judge
from xdiffusion.evaluation.scores import Features, frechet_scores
from xdiffusion.scoring import floor_scores


def of_classes(labels, generator):
    """Features of two dimensions around a place for each class."""
    return 4.0 * torch.eye(2)[labels] + torch.randn(len(labels), 2, generator=generator)


class Identity(Judge):
    def __init__(self):
        nn.Module.__init__(self)

    def features(self, images):
        return images.flatten(1)


class Split:
    def __init__(self, labels, generator):
        self.labels, self.features = labels, of_classes(labels, generator)
        self.drawn = set()

    def __len__(self):
        return len(self.labels)

    def floats(self, index):
        self.drawn |= set(index.tolist())
        return self.features[index, :, None, None]


def data_of(labels, generator):
    return SimpleNamespace(train=Split(labels, generator), prompts=SimpleNamespace(num_classes=2))


@pytest.fixture
def shares(generator):
    """(training images of which 30% are of class 1, features of held-out ones, 60%, the classes of the samples, 50%)."""
    draw = torch.rand(3000, generator=generator)
    held_out = of_classes((draw[:1000] < 0.6).long(), generator)
    return data_of((draw[1000:] < 0.3).long(), generator), held_out, torch.arange(400) % 2


def test_samples_without_a_fault_have_the_balanced_floor(shares, generator):
    data, held_out, labels = shares
    floors = floor_scores(labels, data, Identity(), held_out, 0)
    perfect = [frechet_distance(of_classes(labels, generator), held_out) for _ in range(20)]
    assert floors["frechet_floor_balanced"] == pytest.approx(sum(perfect) / 20, rel=0.2)
    assert floors["frechet_floor"] > 3 * floors["frechet_floor_balanced"]


def test_the_mean_of_some_draws_hangs_less_on_the_seed_than_one(shares, monkeypatch):
    data, held_out, labels = shares

    def spread():
        found = [floor_scores(labels[:60], data, Identity(), held_out, seed)["frechet_floor"] for seed in range(30)]
        return torch.tensor(found).std()

    of_ten = spread()
    monkeypatch.setattr(scoring, "FLOOR_DRAWS", 1)
    assert of_ten < 0.5 * spread()


def test_a_class_of_few_training_images_gives_all_that_it_has(generator):
    data = data_of(torch.tensor([0] * 50 + [1] * 3), generator)
    held_out = of_classes(torch.arange(30) % 2, generator)
    assert all(value > 0 for value in floor_scores(torch.arange(20) % 2, data, Identity(), held_out, 0).values())
    assert {50, 51, 52} <= data.train.drawn


def test_samples_are_drawn_again_within_their_classes(shares, generator, monkeypatch):
    """Their numbers are no chance, and the interval is narrower for it."""
    _, held_out, labels = shares
    compared = Features(of_classes(labels, generator), held_out, None)
    within, across = (frechet_scores(compared, 200, 0, c)["frechet_distance_interval"] for c in (labels, None))
    assert within[1] - within[0] < 0.9 * (across[1] - across[0])

    given = []
    monkeypatch.setattr(scoring, "frechet_scores", lambda *arguments: given.append(arguments) or {})
    monkeypatch.setattr(scoring, "floor_scores", lambda *_: {})
    judge = Identity()
    judge.head = nn.Identity()
    images = torch.zeros(400, 2, 1, 1)
    split = SimpleNamespace(images=images.byte(), floats=lambda: images, groups=torch.arange(400))
    data = SimpleNamespace(inverted=False, train=split, test=split)
    scoring.image_scores(SimpleNamespace(images=images, labels=labels), data, data, judge, 20, 0)
    assert torch.equal(given[0][3], labels)
