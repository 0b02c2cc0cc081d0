"""Nearest training images: exact where it matters, and blind to nothing that was planted."""

import pytest
import scipy.stats
import torch

from xdiffusion.evaluation import memorisation as module
from xdiffusion.evaluation.memorisation import copied, data_copying, nearest


def test_nearest_are_those_of_all_distances(generator, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    images, references = (torch.rand(n, 1, 5, 5, generator=generator) * 2 - 1 for n in (20, 60))
    found = nearest(images, references.split(23), k=3)
    brightness = [x.flatten(1).double() / 2 for x in (images, references)]
    expected = torch.cdist(*brightness).div(5).sort(dim=1)
    torch.testing.assert_close(found.distance.double(), expected.values[:, :3], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.index, expected.indices[:, :3])
    assert nearest(images, references[:2].split(1), k=3).distance.shape == (20, 2)  # there are no more


def test_a_planted_copy_is_at_distance_0(generator):
    references = torch.rand(50, 1, 28, 28, generator=generator) * 2 - 1
    images = torch.cat([references[7:8], torch.rand(5, 1, 28, 28, generator=generator) * 2 - 1])
    distance, index = nearest(images, [references])
    assert (distance[0, 0], index[0, 0]) == (0, 7)
    assert copied(distance).tolist() == [1, 0, 0, 0, 0, 0]


def test_data_copying_is_the_u_statistic_as_a_share(generator):
    samples, held_out = (torch.randint(9, (n,), generator=generator).float() for n in (30, 40))  # with ties
    # scipy counts the pairs whose first is larger
    expected = scipy.stats.mannwhitneyu(held_out.numpy(), samples.numpy()).statistic / (30 * 40)
    assert float(data_copying(samples, held_out).mean()) == pytest.approx(expected)
    assert float(data_copying(held_out, held_out).mean()) == pytest.approx(0.5)
    assert data_copying(torch.zeros(3), torch.ones(4)).tolist() == [1] * 4
    assert data_copying(torch.ones(3), torch.zeros(4)).tolist() == [0] * 4
    assert data_copying(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 2.0])).tolist() == [1, 0, 0.75]
