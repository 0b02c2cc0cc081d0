import pytest
import torch
import torch.nn.functional as F

from xdiffusion.autoencoders import kl
from xdiffusion.autoencoders.kl import KLAutoencoder, _blended_tiles

TINY = {"widths": (8, 16, 16), "num_res_blocks": 1, "norm_groups": 4, "scale_factor": 0.5}


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return KLAutoencoder(3, **TINY).eval()


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 16, 24, generator=generator) * 2 - 1


def test_latents_are_smaller_by_the_factor_and_images_come_back_in_their_size(autoencoder, images):
    assert (autoencoder.pixels_per_latent, autoencoder.latent_channels) == (4, 4)
    latents = autoencoder.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    assert autoencoder.decode(latents).shape == images.shape


def test_encode_gives_the_mean_or_with_a_generator_a_draw(autoencoder, images):
    mean, std = autoencoder.posterior(images)
    assert torch.equal(autoencoder.encode(images), mean)
    draw, again = (autoencoder.encode(images, torch.Generator().manual_seed(3)) for _ in range(2))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw, again)
    assert torch.equal(draw, mean + std * eps)
    assert (std > 0).all()


def test_the_scale_factor_is_inside(autoencoder, images):
    plain = KLAutoencoder(3, **{**TINY, "scale_factor": 1.0})
    plain.load_state_dict(autoencoder.state_dict())
    (mean, std), (mean_1, std_1) = autoencoder.posterior(images), plain.posterior(images)
    torch.testing.assert_close(mean, 0.5 * mean_1)
    torch.testing.assert_close(std, 0.5 * std_1)
    torch.testing.assert_close(autoencoder.decode(mean), plain.decode(mean_1))


def test_every_weight_trains(autoencoder, images):
    autoencoder.decode(autoencoder.encode(images, torch.Generator())).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in autoencoder.parameters())


def test_sliced_and_single_tile_coding_change_nothing(autoencoder, images, monkeypatch):
    latents, decoded = autoencoder.encode(images), autoencoder.decode(autoencoder.encode(images))
    autoencoder.tile_size = 24
    assert torch.equal(autoencoder.encode(images), latents)
    assert torch.equal(autoencoder.decode(latents), decoded)
    decoder, sizes = autoencoder.decoder, []
    decoder.register_forward_hook(lambda module, given, _: sizes.append(len(given[0])))
    monkeypatch.setattr(kl, "PIXELS_AT_A_TIME", 2 * 16 * 24 - 1)
    torch.testing.assert_close(autoencoder.encode(images), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert sizes == [1, 1]


@pytest.mark.parametrize(("height", "width", "tile"), [(8, 8, 6), (30, 22, 8), (16, 50, 12), (6, 40, 10)])
def test_tiles_of_a_local_code_blend_into_the_whole(height, width, tile, generator):
    """Where a pixel depends on no other, it does not matter which tiles it is in."""
    x = torch.randn(2, 3, height, width, generator=generator)
    larger = _blended_tiles(lambda piece: F.interpolate(piece, scale_factor=2), x, tile, 1, 2)
    torch.testing.assert_close(larger, F.interpolate(x, scale_factor=2))
    smaller = _blended_tiles(lambda piece: F.avg_pool2d(piece, 2), x, tile, 2, 1)
    torch.testing.assert_close(smaller, F.avg_pool2d(x, 2))


@torch.no_grad()
def test_the_larger_the_tiles_the_nearer_they_come_to_the_whole(autoencoder, generator):
    """On an image that is everywhere alike; a tile differs by its edges and by its own statistics in the norms."""
    images = torch.rand(1, 3, 160, 160, generator=generator) * 2 - 1
    latents = autoencoder.encode(images)
    whole, errors = {"encode": latents, "decode": autoencoder.decode(latents)}, []
    for tile_size in (48, 128):
        autoencoder.tile_size = tile_size
        tiled = {"encode": autoencoder.encode(images), "decode": autoencoder.decode(latents)}
        assert all(tiled[name].shape == whole[name].shape for name in whole)
        inside = (..., slice(8, -8), slice(8, -8))
        errors.append([float((tiled[n] - whole[n])[inside].norm() / whole[n][inside].norm()) for n in whole])
    small, large = errors
    assert all(0 < after < 0.25 and after < before for before, after in zip(small, large)), errors


def test_bad_arguments_and_sizes_are_named(autoencoder):
    with pytest.raises(ValueError, match="norm_groups=5 does not divide the level width 8"):
        KLAutoencoder(3, **{**TINY, "norm_groups": 5})
    with pytest.raises(ValueError, match=r"multiples of 4, not \(16, 18\)"):
        autoencoder.encode(torch.zeros(1, 3, 16, 18))


def test_tiles_in_half_precision_are_as_exact_as_the_whole(autoencoder):
    """The weights of a tile of 512 go up to 65,536, which float16 does not have."""
    x = torch.randn(1, 3, 640, 520, generator=torch.Generator().manual_seed(0)).half()
    assert torch.allclose(_blended_tiles(lambda tile: tile, x, 512, 8, 8), x, atol=1e-3)
