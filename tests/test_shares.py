"""Intervals of shares: scipy's exact ones, and as often around the truth as they say, also near 0 and 1."""

import pytest
import scipy.stats
import torch

from xdiffusion.evaluation.bootstrap import mean_interval
from xdiffusion.evaluation.memorisation import data_copying
from xdiffusion.evaluation.shares import independent, pairs_share_interval, share_interval


@pytest.mark.parametrize(("hits", "trials"), [(0, 40), (40, 40), (1, 40), (20, 40), (0, 1), (1, 1), (991, 1000)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_a_share_of_trials_has_the_exact_binomial_interval(hits, trials, level):
    expected = scipy.stats.binomtest(hits, trials).proportion_ci(level, "exact")
    assert share_interval((torch.arange(trials) < hits).float(), level=level) == pytest.approx(tuple(expected), abs=1e-9)


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
        rows = data_copying(torch.randn(40, generator=generator), shift + torch.randn(40, generator=generator))
        share = float(rows.mean())
        low, high = pairs_share_interval(share, 40, 40)
        held += low <= truth <= high
    assert held / 400 >= least


def test_rows_of_one_group_count_as_one_where_they_are_equal(generator):
    rows = torch.randn(30, generator=generator)
    assert independent(rows, torch.arange(30)) == pytest.approx(30)
    assert independent(rows.repeat(4), torch.arange(30).repeat(4)) == pytest.approx(30, rel=0.03)
    assert independent(torch.ones(120), torch.arange(30).repeat(4)) == 30
    assert independent(rows, torch.zeros(30, dtype=torch.long)) == 1
    assert independent(torch.tensor([1.0, -1.0] * 15), torch.arange(30) // 2) == 30  # each group balances itself


def test_how_many_rows_of_few_groups_are_independent():
    """The variance of a mean by its rows, over that by its groups: sums of 3 and -1, -2 around a mean of 1, of 6 rows."""
    rows, groups = torch.tensor([4.0, 1.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    by_rows = (9 + 0 + 1 + 0 + 1 + 1) / 5 / 6
    by_groups = 3 / 2 * (3**2 + 1**2 + 2**2) / 6**2
    assert independent(rows, groups) == pytest.approx(6 * by_rows / by_groups)
    against = torch.tensor([1.0, -0.9, 1.0, -0.9, -1.0, 0.8])  # rows that balance each other are not more than they are
    assert independent(against, groups) == 6


@pytest.mark.parametrize("trials", [7, 40, 999, 1000])
def test_trials_of_groups_of_their_own_are_independent(trials, generator):
    hits = (torch.rand(trials, generator=generator) < 0.3).float()
    assert share_interval(hits, torch.arange(trials)) == share_interval(hits)


def variants(generator, sources, level):
    """Of each source 1 to 8 values in shuffled order: 0 or 1, at a threshold that most variants of a source share."""
    sizes = torch.randint(1, 9, (sources,), generator=generator)
    groups = torch.arange(sources).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()), generator=generator)]
    values = torch.randn(sources, generator=generator)[groups] + 0.5 * torch.randn(len(groups), generator=generator)
    return values - level * 1.25**0.5, groups


def test_a_share_over_groups_has_the_bootstrap_s_width(generator):
    values, groups = variants(generator, 400, 0.5)
    hits = (values > 0).float()
    low, high = share_interval(hits, groups)
    assert (low, high) == pytest.approx(mean_interval(hits, groups), abs=0.006)
    assert high - low > 1.5 * (share_interval(hits)[1] - share_interval(hits)[0])


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_intervals_over_groups_hold_the_truth_as_often_as_they_say(level, generator):
    """P = 0.5 and 0.067, of 60 sources; those that take the rows for independent do not."""
    truth = scipy.stats.norm.sf(level)
    held = {"groups": 0, "rows": 0}
    for _ in range(120):
        values, groups = variants(generator, 60, level)
        for name, of in (("groups", groups), ("rows", None)):
            low, high = share_interval((values > 0).float(), of)
            held[name] += low <= truth <= high
    assert held["rows"] < 102 < 109 <= held["groups"]


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_intervals_of_pairs_over_groups_hold_the_truth_as_often_as_they_say(level, generator):
    """Samples against variants of 40 sources: how many variants there are does not count."""
    truth = scipy.stats.norm.sf(level / 2**0.5)
    held = {"groups": 0, "rows": 0}
    for _ in range(120):
        values, groups = variants(generator, 40, level)
        rows = data_copying(1.25**0.5 * torch.randn(200, generator=generator), values)
        for name, count in (("groups", independent(rows, groups)), ("rows", len(rows))):
            low, high = pairs_share_interval(float(rows.mean()), 200, count)
            held[name] += low <= truth <= high
    assert held["rows"] < 102 < 109 <= held["groups"]
