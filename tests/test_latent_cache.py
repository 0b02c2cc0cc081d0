"""Cached latents and text embeddings: the run that uses them is the run that does not, and nothing stale is served."""

import pytest
import torch
from omegaconf import OmegaConf
from picture_folders import truncate, write_pictures
from PIL import Image
from tiny_sd import tiny_sd_config, tiny_sd_model, tiny_sd_trainer

from xdiffusion.autoencoders.identity import IdentityAutoencoder
from xdiffusion.build import build_data
from xdiffusion.checkpoints.tensor_cache import TensorCache
from xdiffusion.data.image_files import Picture
from xdiffusion.training.latent_cache import LatentCache, cache_for

NONE = ("cache.latents=false", "cache.text_embeddings=false")


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16), (24, 16), (16, 16), (16, 25)], ["a cat", "a dog"])
    return tmp_path


@pytest.mark.parametrize("flip", ["false", "true"])
def test_a_run_with_caches_is_the_run_without(folder, flip):
    cached = tiny_sd_trainer(tiny_sd_config(folder, f"data.flip={flip}"))
    plain = tiny_sd_trainer(tiny_sd_config(folder, f"data.flip={flip}", *NONE))
    for step in range(1, 4):
        # single pictures are encoded, not batches of them: equal up to rounding
        assert cached.step(step).loss == pytest.approx(plain.step(step).loss, rel=1e-5)
    assert (folder / "cache/kl").is_dir() and (folder / "cache/clip").is_dir()


def test_the_second_run_computes_nothing(folder, capsys):
    config = tiny_sd_config(folder)
    first = tiny_sd_trainer(config)
    assert "latents: 4 computed" in capsys.readouterr().out
    second = tiny_sd_trainer(config)
    out = capsys.readouterr().out
    assert "latents: 0 computed" in out and "text embeddings: 0 computed" in out
    assert first.step(1).loss == second.step(1).loss


def test_a_picture_is_hashed_once_for_all_its_latents(folder, monkeypatch):
    config = tiny_sd_config(folder, "data.flip=true")
    tiny_sd_trainer(config)
    of_file, hashed = Picture.content_hash, []
    monkeypatch.setattr(Picture, "content_hash", lambda self: hashed.append(self.name) or of_file(self))
    tiny_sd_trainer(config)
    assert len(hashed) == len(set(hashed)) == 4


def test_of_several_processes_each_computes_in_an_order_of_its_own(folder, monkeypatch):
    """And finds what another has put there while it computed."""
    config = tiny_sd_config(folder)
    data, autoencoder = build_data(config), tiny_sd_model(config).autoencoder
    cache = cache_for(autoencoder, OmegaConf.to_container(config.model.autoencoder), folder / "own")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    orders = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        orders.append([index for index, *_ in LatentCache(data, autoencoder, cache).entries])
    assert all(sorted(order) == list(range(4)) for order in orders)
    assert len(set(map(tuple, orders))) > 2
    assert orders[0] == list(range(4))


def test_every_step_draws_its_own_latent(folder):
    batches = tiny_sd_trainer(tiny_sd_config(folder, "training.batch_size=1")).task.batches
    by_picture = {}
    for step in range(1, 20):
        by_picture.setdefault(int(batches.indices(step)[0]), []).append(batches.part(step, 0, 1).x0)
    assert any(len(drawn) > 1 and not torch.equal(drawn[0], drawn[1]) for drawn in by_picture.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write_pictures(folder / "set", [(16, 16)], seed=5),
        lambda folder: Image.open(folder / "set/picture_0.png").transpose(0).save(folder / "set/picture_0.png"),
    ],
    ids=["another picture", "mirrored in place"],
)
def test_a_changed_picture_is_computed_anew(folder, change):
    before = LatentCacheOf(folder)
    change(folder)
    after = LatentCacheOf(folder)
    assert after.cache.computed == 1
    assert not torch.equal(before.mean(0), after.mean(0)) and torch.equal(before.mean(2), after.mean(2))


@pytest.mark.parametrize(
    ("override", "computed"),
    [
        ("data.flip=true", 4),  # the flipped ones
        ("data.max_aspect=1", 2),  # those of other shapes
        ("model.autoencoder.scale_factor=0.5", 4),
        ("data.image_size=32", 4),
        ("training.seed=3", 0),
        ("training.batch_size=2", 0),
    ],
)
def test_a_changed_config_is_computed_anew_where_it_matters(folder, override, computed):
    LatentCacheOf(folder)
    assert LatentCacheOf(folder, override).cache.computed == computed


def test_other_weights_are_computed_anew(folder):
    LatentCacheOf(folder)
    config = tiny_sd_config(folder)
    model = tiny_sd_model(config)
    with torch.no_grad():
        next(model.autoencoder.parameters())[0] += 1e-3
    assert LatentCacheOf(folder, model=model).cache.computed == 4


def test_clip_skip_is_part_of_an_embedding_s_key(folder, capsys):
    two = "model.text_encoder.layers=2"
    tiny_sd_trainer(tiny_sd_config(folder, two))
    tiny_sd_trainer(tiny_sd_config(folder, two, "model.text_encoder.clip_skip=2"))
    assert capsys.readouterr().out.count("text embeddings: 3 computed") == 2  # two captions and the empty one


def test_a_truncated_picture_is_replaced_as_it_is_without_a_cache(folder, capsys):
    truncate(folder / "set/picture_2.png")
    cached = LatentCacheOf(folder)
    assert cached.batch(2)[0] == [0] and torch.equal(cached.mean(2), cached.mean(0))
    assert cached.cache.computed == 3  # what stands for it is encoded once
    assert "picture_2.png is replaced" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [(), NONE], ids=["cached", "not cached"])
def test_the_only_picture_of_a_shape_may_be_damaged_between_two_runs(folder, overrides, capsys):
    LatentCacheOf(folder)
    truncate(folder / "set/picture_1.png")
    trainer = tiny_sd_trainer(tiny_sd_config(folder, *overrides))
    assert "skipped 1: picture_1.png (cannot be read" in capsys.readouterr().out
    assert all(trainer.step(step).loss > 0 for step in range(1, 5))


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()], ids=["truncated", "removed"])
def test_entries_that_are_gone_are_computed_again(folder, damage, capsys):
    trainer, same = tiny_sd_trainer(tiny_sd_config(folder)), tiny_sd_trainer(tiny_sd_config(folder))
    for path in (folder / "cache").rglob("*.safetensors"):
        damage(path)
    losses = [trainer.step(step).loss for step in (1, 2)]
    assert "is gone or damaged: it is computed again" in capsys.readouterr().err
    assert losses == [same.step(step).loss for step in (1, 2)]
    assert "is gone" not in capsys.readouterr().err  # they are there again


def test_embeddings_are_read_once(folder, monkeypatch):
    trainer = tiny_sd_trainer(tiny_sd_config(folder))
    first = trainer.task.embed(["a cat", "a dog"])
    monkeypatch.setattr(TensorCache, "get", lambda *_: pytest.fail("read again"))
    assert torch.equal(trainer.task.embed(["a dog", "a cat"]), first.flip(0))


def test_pixels_are_not_cached(folder):
    with pytest.raises(ValueError, match="this model's pixels are its latents"):
        LatentCache(build_data(tiny_sd_config(folder)), IdentityAutoencoder(3), TensorCache(folder / "cache", {}))


def test_parts_that_are_cached_leave_the_device_but_for_the_sample_grids(folder, monkeypatch):
    trainer = tiny_sd_trainer(tiny_sd_config(folder))
    assert trainer.task.sources.parked == [trainer.model.autoencoder, trainer.model.text_encoder]
    moves = []
    for part in trainer.task.sources.parked:
        monkeypatch.setattr(part, "to", moves.append)
    with trainer.task.sources.whole_model():
        assert moves == [torch.device("cpu")] * 2
    assert moves[2:] == ["cpu", "cpu"]


class LatentCacheOf:
    """The cache of a folder's pictures under a config."""

    def __init__(self, folder, *overrides, model=None):
        config = tiny_sd_config(folder, *overrides)
        autoencoder = (model or tiny_sd_model(config)).autoencoder
        self.images = build_data(config)
        self.cache = LatentCache(
            self.images,
            autoencoder,
            cache_for(autoencoder, OmegaConf.to_container(config.model.autoencoder), folder / "cache"),
        )

    def batch(self, index):
        crops = self.images.crops(torch.ones(3, 1))
        return self.cache.batch(torch.tensor([index]), crops, self.images.sizes[index])

    def mean(self, index):
        return self.batch(index)[1]
