"""Intervals of shares: scipy's exact ones, and as often around the truth as they say, also near 0 and 1."""

import pytest
import scipy.stats
import torch

from xdiffusion.evaluation.memorisation import data_copying
from xdiffusion.evaluation.shares import pairs_share_interval, share_interval


@pytest.mark.parametrize(("hits", "trials"), [(0, 40), (40, 40), (1, 40), (20, 40), (0, 1), (1, 1), (991, 1000)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_a_share_of_trials_has_the_exact_binomial_interval(hits, trials, level):
    expected = scipy.stats.binomtest(hits, trials).proportion_ci(level, "exact")
    assert share_interval((torch.arange(trials) < hits).float(), level) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_an_interval_of_pairs_is_wider_than_its_share_and_the_same_from_the_other_side(share):
    low, high = pairs_share_interval(share, 40, 60)
    assert 0 <= low <= share <= high <= 1
    assert 0.01 < high - low < 0.3
    assert pairs_share_interval(1 - share, 60, 40) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.92), (1.2, 0.92), (2.6, 0.92)])
def test_intervals_of_pairs_hold_the_truth_as_often_as_they_say(shift, least, generator):
    """Distances that are normal, not the exponential ones of the formula; P = 0.5, 0.80 and 0.967."""
    truth = scipy.stats.norm.cdf(shift / 2**0.5)
    held = 0
    for _ in range(400):
        share = data_copying(torch.randn(40, generator=generator), shift + torch.randn(40, generator=generator))
        low, high = pairs_share_interval(share, 40, 40)
        held += low <= truth <= high
    assert held / 400 >= least
