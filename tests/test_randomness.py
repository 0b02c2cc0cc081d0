"""Every draw is a function of the seed and of where in the run it is made."""

import pytest
import torch

from xdiffusion.training.randomness import DataOrder, generator_at


def draw(*place):
    return torch.rand(4, generator=generator_at(*place)).tolist()


def test_a_place_has_its_own_draws_always():
    places = [(0, "noise", 1), (0, "noise", 2), (1, "noise", 1), (0, "captions", 1), (0, "noise", 11), (0, "noise", 0)]
    assert [draw(*place) for place in places] == [draw(*place) for place in places]
    assert len({tuple(draw(*place)) for place in places}) == len(places)
    assert draw(0, "noise") == draw(0, "noise", 0)


def test_the_seeds_are_the_ones_of_yesterday():
    """A run that is resumed with a newer version must draw on as it began."""
    blake2b = bytes.fromhex("8f99d7f8bef5c723")  # of "0|noise|1", to eight bytes
    assert generator_at(0, "noise", 1).initial_seed() == int.from_bytes(blake2b, "little") // 2


@pytest.mark.parametrize(("size", "batch_size"), [(10, 5), (10, 3), (7, 20), (1, 3), (6, 6)])
def test_every_sample_is_seen_once_per_epoch(size, batch_size):
    order = DataOrder(size, batch_size, seed=0)
    batches = [order.indices(step) for step in range(3 * size)]  # 3 * batch_size epochs
    assert all(len(batch) == batch_size for batch in batches)
    seen = torch.cat(batches).view(-1, size)
    assert all(torch.equal(epoch.sort().values, torch.arange(size)) for epoch in seen)
    if size > 1:
        assert not torch.equal(seen[0], seen[1])


def test_the_order_is_a_function_of_seed_and_step():
    """Whatever was asked before: a resumed run asks for step 40 first."""
    order = DataOrder(10, 3, seed=0)
    forwards = [order.indices(step) for step in range(40)]
    for step in (39, 0, 17, 3, 16):
        assert torch.equal(DataOrder(10, 3, seed=0).indices(step), forwards[step])
        assert torch.equal(order.indices(step), forwards[step])
    assert not torch.equal(torch.cat(forwards[:4]), torch.cat([DataOrder(10, 3, seed=1).indices(s) for s in range(4)]))
