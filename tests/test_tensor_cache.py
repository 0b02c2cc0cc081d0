"""Tensors on the disk by everything they depend on."""

import torch

from xdiffusion.checkpoints.tensor_cache import TensorCache

X = {"x": torch.arange(6.0).view(2, 3)}


def test_what_is_put_is_got(tmp_path):
    cache = TensorCache(tmp_path, {"weights": "abc"})
    assert cache.get("a key with / and spaces") is None
    cache.put("a key with / and spaces", X)
    assert torch.equal(TensorCache(tmp_path, {"weights": "abc"}).get("a key with / and spaces")["x"], X["x"])
    assert cache.get("another") is None
    assert cache.holds("a key with / and spaces") and not cache.holds("another")


def test_other_weights_or_settings_find_nothing(tmp_path):
    TensorCache(tmp_path, {"weights": "abc", "clip_skip": 1}).put("key", X)
    assert TensorCache(tmp_path, {"clip_skip": 1, "weights": "abc"}).get("key") is not None  # whatever the order
    for other in ({"weights": "abd", "clip_skip": 1}, {"weights": "abc", "clip_skip": 2}, {"weights": "abc"}):
        assert TensorCache(tmp_path, other).get("key") is None


def test_a_damaged_entry_counts_as_none_and_is_written_anew(tmp_path):
    cache = TensorCache(tmp_path, {})
    cache.put("key", X)
    cache.path("key").write_bytes(cache.path("key").read_bytes()[:-5])
    assert cache.holds("key") and cache.get("key") is None  # seen by reading it alone
    cache.put("key", X)
    assert cache.get("key").keys() == X.keys()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [cache.path("key")]
