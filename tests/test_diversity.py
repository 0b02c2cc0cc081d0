"""Diversity: its definition written out, and its two ends."""

import math

import pytest
import torch

from xdiffusion.evaluation.diversity import diversity, mean_distance, within_class_distance


def test_the_mean_over_classes_of_the_mean_over_pairs():
    features = torch.tensor([[0.0], [1.0], [3.0], [10.0], [10.5], [99.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])  # a class of one has no pairs
    assert within_class_distance(features, labels) == pytest.approx(((1 + 3 + 2) / 3 + 0.5) / 2)


def test_the_data_itself_is_1_and_one_picture_per_class_0(generator):
    real, labels = torch.randn(40, 3, generator=generator), torch.arange(40) % 4
    assert diversity(real, labels, real, labels) == 1
    assert diversity(3 * real, labels, real, labels) == pytest.approx(3)
    one_each = torch.randn(4, 3, generator=generator)[labels]
    assert diversity(one_each, labels, real, labels) == 0
    assert math.isnan(diversity(real, labels, one_each, labels))


def test_a_mean_by_a_table_is_that_of_the_points(generator):
    points, index = torch.randn(9, 3, generator=generator), torch.tensor([4, 0, 7])
    alone = within_class_distance(points[index], torch.zeros(3, dtype=torch.long))
    assert mean_distance(torch.cdist(points, points), index) == pytest.approx(alone, rel=1e-5)


def test_a_distance_needs_two():
    with pytest.raises(ValueError, match="3 samples: no class has two"):
        within_class_distance(torch.zeros(3, 2), torch.arange(3))
