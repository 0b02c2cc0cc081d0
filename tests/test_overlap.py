"""Precision, recall, density and coverage: against scikit-learn's neighbours, and where the answer is known."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from xdiffusion.evaluation import overlap as module
from xdiffusion.evaluation.overlap import overlap


def means(real, generated, **k):
    return {name: float(rows.mean()) for name, rows in overlap(real, generated, **k)._asdict().items()}


@pytest.mark.parametrize("block", [7, 1000])
def test_the_definitions_by_scikit_learns_neighbours(block, generator, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    real, generated = torch.randn(50, 3, generator=generator), 0.7 * torch.randn(40, 3, generator=generator) + 0.5
    k = 3
    balls = {}  # of each set: whether a point of the other lies in the ball around each of its points
    for name, own, other in (("real", real, generated), ("generated", generated, real)):
        neighbours = NearestNeighbors(n_neighbors=k + 1).fit(own.double().numpy())
        radii = neighbours.kneighbors(own.double().numpy())[0][:, -1]
        balls[name] = (torch.cdist(own.double(), other.double()) <= torch.tensor(radii)[:, None]).double()
    found = means(real, generated, k=k)
    assert found["precision"] == pytest.approx(float(balls["real"].amax(0).mean()))
    assert found["recall"] == pytest.approx(float(balls["generated"].amax(0).mean()))
    assert found["density"] == pytest.approx(float(balls["real"].sum(0).mean()) / k)
    assert found["coverage"] == pytest.approx(float(balls["real"].amax(1).mean()))
    assert 0.3 < found["coverage"] < found["precision"] < 1


def test_one_distribution_has_the_coverage_of_the_paper(generator):
    """[DensityCoverage] lemma 2 for equal numbers, and a mean density of 1."""
    n, k = 300, 5
    found = [means(*torch.randn(2, n, 4, generator=generator), k=k) for _ in range(10)]
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert sum(f["coverage"] for f in found) / 10 == pytest.approx(expected, abs=0.01)
    assert sum(f["density"] for f in found) / 10 == pytest.approx(1, abs=0.05)


def test_a_set_is_its_own_and_a_far_one_is_nobodys(generator):
    real = torch.randn(20, 3, generator=generator)
    assert means(real, real) == {"precision": 1, "recall": 1, "density": pytest.approx(6 / 5, abs=0.25), "coverage": 1}
    assert set(means(real, real + 100).values()) == {0}


def test_one_mode_is_precise_and_covers_little(generator):
    real = torch.cat([torch.randn(50, 2, generator=generator) + 20 * k for k in range(4)])
    one_mode = torch.randn(200, 2, generator=generator)
    found = means(real, one_mode)
    assert found["precision"] > 0.8
    assert found["coverage"] < 0.3
    assert found["recall"] < 0.3


def test_too_few_points():
    with pytest.raises(ValueError, match="5 real and 9 generated points: k=5 neighbours need more of both"):
        overlap(torch.zeros(5, 2), torch.zeros(9, 2))
