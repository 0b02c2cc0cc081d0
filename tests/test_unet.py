import pytest
import torch

from xdiffusion.layers.embeddings import sinusoidal_embedding
from xdiffusion.layers.resnet import Downsample
from xdiffusion.networks.unet import UNet

TINY = {"in_channels": 1, "context_dim": 12, "channels": (16, 32), "transformer_depth": (0, 1), "num_res_blocks": 1,
        "head_dim": 8, "norm_groups": 4}  # fmt: skip


def inputs(size=8, batch=2, channels=1):
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(batch, channels, size, size, generator=generator)
    return xt, torch.rand(batch, generator=generator) * 1000, torch.randn(batch, 5, 12, generator=generator)


def randomised(unet):
    """Weights without the zeros that a fresh network starts from."""
    with torch.no_grad():
        for i, p in enumerate(unet.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return unet


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"patch_size": 2},
        {"projection": "conv", "time_conditioning": "add"},
        {"projection": "none", "ff_mult": 0, "qk_norm": True},
        {"resample": "resample"},
        {"head_dim": None, "num_heads": 2},
        {"channels": (16,), "transformer_depth": (2,)},
        {"in_channels": 3, "out_channels": 6},
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_variant_keeps_the_image_shape_and_trains_every_weight(arguments, channels_last):
    unet = randomised(UNet(**{**TINY, **arguments}))
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    xt, time, context = inputs(channels=arguments.get("in_channels", 1))
    out = unet(xt, time, context)
    assert out.shape == (2, arguments.get("out_channels") or xt.shape[1], 8, 8)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_a_fresh_network_predicts_zero():
    assert UNet(**TINY)(*inputs()).abs().max() == 0


def test_memory_layouts_agree():
    unet = randomised(UNet(**TINY))
    expected = unet(*inputs())
    actual = unet.to(memory_format=torch.channels_last)(*inputs())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_channels_last_has_no_layout_changes_inside():
    """A mixture of layouts costs a third more time; every convolution must get and give channels_last."""
    unet = randomised(UNet(**TINY)).to(memory_format=torch.channels_last)
    mixed = []
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm)):
            module.register_forward_hook(
                lambda m, i, o, name=name: (
                    mixed.append(name)
                    if not (
                        i[0].is_contiguous(memory_format=torch.channels_last)
                        and o.is_contiguous(memory_format=torch.channels_last)
                    )
                    else None
                )
            )
    unet(*inputs())
    assert mixed == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_linear_layer_sees_rows(layout):
    """Of a view with other strides torch's product has other bits where the weight is trained than where it is frozen."""
    unet = randomised(UNet(**TINY)).to(memory_format=layout)
    views = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: None if i[0].is_contiguous() else views.append(name))
    unet(*inputs())
    assert views == []


def test_odd_sizes_come_back():
    unet = randomised(UNet(**TINY))
    assert unet(*inputs(size=9)).shape[-1] == 9


def test_gradient_checkpointing_changes_no_gradient():
    unet = randomised(UNet(**TINY))
    unet(*inputs()).square().mean().backward()
    plain = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()
    unet.gradient_checkpointing = True
    unet(*inputs()).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, unet.parameters()))


def test_time_embedding_by_hand():
    time = torch.tensor([0.0, 1.0, 500.5])
    embedding = sinusoidal_embedding(time, 6)
    frequencies = [10_000 ** (-i / 3) for i in range(3)]
    for t, row in zip(time.tolist(), embedding):
        angles = torch.tensor([t * f for f in frequencies])
        torch.testing.assert_close(row, torch.cat([angles.cos(), angles.sin()]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="even, not 7"):
        sinusoidal_embedding(time, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transformer_depth": (1,)}, "must be of one length"),
        ({"num_heads": 2}, "either head_dim or num_heads"),
        ({"head_dim": None}, "either head_dim or num_heads"),
        ({"head_dim": 5}, "head_dim=5 does not divide 16"),
        ({"norm_groups": 5}, "norm_groups=5 does not divide"),
        ({"channels": (15, 30), "head_dim": 5, "norm_groups": 5}, r"channels=\[15, 30\]: the first width must be even"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **arguments})


@pytest.mark.parametrize("kind", ["conv", "resample"])
@pytest.mark.parametrize(("size", "half"), [(8, 4), (7, 4), (2, 1), (1, 1)])
def test_half_of_an_odd_size_is_rounded_up(kind, size, half):
    x = torch.randn(2, 4, size, size + 1)
    assert Downsample(4, kind)(x).shape == (2, 4, half, (size + 2) // 2)


def test_a_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="patch_size=3 does not divide the image size"):
        UNet(**TINY, patch_size=3)(*inputs())
