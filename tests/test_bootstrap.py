"""Bootstrap intervals against textbook ones, and against what repeating the whole measurement does."""

import math

import pytest
import torch

from xdiffusion.evaluation.bootstrap import interval, mean_interval
from xdiffusion.evaluation.frechet import frechet_distance


def test_the_interval_of_a_share_is_the_binomial_one():
    hits = (torch.arange(1000) < 900).float()
    low, high = mean_interval(hits, resamples=2000)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 1000)
    assert (low, high) == pytest.approx((0.9 - half, 0.9 + half), abs=0.002)
    narrow = mean_interval(hits, resamples=2000, level=0.68)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 1.96, rel=0.1)


def test_the_interval_of_a_frechet_distance_is_where_other_draws_fall(generator):
    """Distances of fresh draws of as many rows: the interval of one draw is as wide as they are spread, and not beside."""
    shift = torch.tensor([1.0, 0.0, 0.0, 0.0])

    def draw():
        return torch.randn(60, 4, generator=generator), shift + torch.randn(60, 4, generator=generator)

    repeats = torch.tensor([frechet_distance(*draw()) for _ in range(300)])
    pairs = [draw() for _ in range(20)]
    bounds = torch.tensor([interval(frechet_distance, *pair, centred=True, resamples=100) for pair in pairs])
    estimates = torch.tensor([frechet_distance(*pair) for pair in pairs])
    assert ((bounds[:, 0] < estimates) & (estimates < bounds[:, 1])).all()
    spread = repeats.quantile(0.975) - repeats.quantile(0.025)
    assert (bounds[:, 1] - bounds[:, 0]).mean() == pytest.approx(spread, rel=0.25)
    covered = (bounds[:, 0] < repeats.mean()) & (repeats.mean() < bounds[:, 1])
    assert covered.float().mean() >= 0.8


def clustered(generator, sources=60, size=6, own=0.3):
    """Rows of sources that have 1 to `size` variants, which differ by little, and the source of each row, shuffled."""
    sizes = torch.randint(1, size + 1, (sources,), generator=generator)
    groups = torch.arange(sources).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()), generator=generator)]
    values = torch.randn(sources, generator=generator)
    return values[groups] + own * torch.randn(len(groups), generator=generator), groups


def test_variants_are_drawn_together(generator):
    """The textbook's variance of a mean over clusters, and the interval holds the truth as often as it says."""
    rows, groups = clustered(generator, sources=400)
    low, high = mean_interval(rows, groups, resamples=2000)
    residuals = torch.zeros(400).index_add(0, groups, rows - rows.mean())
    half = 1.96 * float(residuals.square().sum().sqrt()) / len(rows)
    assert (low, high) == pytest.approx((float(rows.mean()) - half, float(rows.mean()) + half), abs=0.1 * half)

    held = {"groups": 0, "rows": 0}
    for _ in range(100):
        rows, groups = clustered(generator)
        for name, of in (("groups", groups), ("rows", None)):
            low, high = mean_interval(rows, of, resamples=80)
            held[name] += low <= 0 <= high
    assert 88 <= held["groups"] <= 99
    assert held["rows"] < 80


def test_groups_of_one_row_are_rows(generator):
    rows = torch.randn(30, generator=generator)
    assert mean_interval(rows, torch.arange(30) + 7, resamples=50) == mean_interval(rows, resamples=50)


def test_each_set_is_drawn_by_its_own_groups():
    """One group is the whole set each time; of the other, each row twice."""
    first, second, drawn = torch.arange(4.0), torch.arange(6.0), []
    groups = [torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 2, 0, 1, 2])]
    interval(lambda *sets: drawn.append(sets) or 0.0, first, second, groups=groups, resamples=20)
    for whole, pairs in drawn:
        assert torch.equal(whole, first)
        assert torch.equal(pairs[::2] + 3, pairs[1::2]) and len(pairs) == 6
    assert len({tuple(pairs.tolist()) for _, pairs in drawn}) > 5


def test_strata_keep_their_numbers(generator):
    """As the classes of samples do; else their numbers, which are no chance, make the interval of a mean twice as wide."""
    classes = torch.arange(400) % 2
    rows = 3.0 * classes + torch.randn(400, generator=generator)
    drawn = []
    interval(lambda index: drawn.append(classes[index].sum().item()) or 0.0, torch.arange(400), strata=[classes], resamples=20)
    assert set(drawn) == {200}
    low, high = interval(lambda r: r.mean().item(), rows, strata=[classes], resamples=2000)
    within = sum(rows[classes == c].var().item() / 200 for c in range(2)) ** 0.5 / 2
    assert high - low == pytest.approx(2 * 1.96 * within, rel=0.1)


def test_strata_of_other_orders_and_sizes_are_drawn_from_themselves(generator):
    classes = torch.tensor([5, 1, 5, 5, 9, 1])
    seen = []
    interval(lambda index: seen.append(index) or 0.0, torch.arange(6), strata=[classes], resamples=200)
    for index in seen:
        assert classes[index].sort().values.tolist() == [1, 1, 5, 5, 5, 9]
    assert torch.cat(seen).unique().tolist() == list(range(6))


def test_a_function_of_its_seed_that_leaves_the_global_one_alone():
    rows, state = torch.arange(20.0), torch.get_rng_state()
    first, again, other = (mean_interval(rows, resamples=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("settings", [{"resamples": 1}, {"level": 1.0}])
def test_what_no_interval_is_made_of(settings):
    with pytest.raises(ValueError, match="need at least 2, and a level in"):
        mean_interval(torch.ones(3), **settings)
