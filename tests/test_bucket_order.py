"""The order of bucketed pictures: one shape per batch, a function of seed and step, nothing left out."""

from collections import Counter

import pytest
import torch

from xdiffusion.training.bucket_order import BucketOrder

BUCKETS = [torch.arange(0, 7), torch.arange(7, 10), torch.arange(10, 11)]


def drawn(order, steps):
    return [order.indices(step).tolist() for step in range(steps)]


def test_every_batch_is_whole_and_of_one_bucket():
    for batch in drawn(BucketOrder(BUCKETS, 4, seed=0), 60):
        assert len(batch) == 4 and any(set(batch) <= set(bucket.tolist()) for bucket in BUCKETS)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_picture_is_seen_equally_often(batch_size):
    cycle = 11  # steps in which bucket k comes as often as it has pictures
    counts = Counter(i for batch in drawn(BucketOrder(BUCKETS, batch_size, seed=0), 2 * cycle) for i in batch)
    assert counts == dict.fromkeys(range(11), 2 * batch_size)


def test_a_step_does_not_depend_on_the_steps_before():
    whole = drawn(BucketOrder(BUCKETS, 4, seed=3), 40)
    for step in (39, 0, 17):
        assert BucketOrder(BUCKETS, 4, seed=3).indices(step).tolist() == whole[step]
    assert drawn(BucketOrder(BUCKETS, 4, seed=4), 40) != whole


def test_buckets_of_one_size_are_in_orders_of_their_own():
    first, second = torch.arange(20), torch.arange(20, 40)
    seen = torch.tensor([i for (i,) in drawn(BucketOrder([first, second], 1, seed=0), 40)])
    assert not torch.equal(seen[seen < 20], seen[seen >= 20] - 20)


def test_the_buckets_are_shared_out_evenly_at_any_time():
    order = BucketOrder([torch.arange(0, 60), torch.arange(60, 90), torch.arange(90, 100)], 2, seed=1)
    seen = Counter()
    for step, batch in enumerate(drawn(order, 300), start=1):
        seen[next(k for k, limit in enumerate((60, 90, 100)) if batch[0] < limit)] += 1
        for k, share in enumerate((0.6, 0.3, 0.1)):
            assert abs(seen[k] - share * step) <= 1


def test_within_a_bucket_pictures_come_epoch_after_epoch():
    order = BucketOrder([torch.arange(8)], 4, seed=0)
    for first in range(0, 20, 2):
        assert sorted(order.indices(first).tolist() + order.indices(first + 1).tolist()) == list(range(8))
