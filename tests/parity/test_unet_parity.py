"""The UNet beside diffusers' UNet2DConditionModel: one table of names carries the weights both ways."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from xdiffusion.checkpoints.diffusers import unet_from_diffusers, unet_to_diffusers
from xdiffusion.networks.unet import UNet

SD15 = {"channels": (32, 64, 64), "transformer_depth": (1, 1, 0), "num_res_blocks": 2, "num_heads": 4,
        "projection": "conv", "time_conditioning": "add", "norm_groups": 8}  # fmt: skip
SD21 = {**SD15, "num_heads": None, "head_dim": 16, "projection": "linear"}


def reference(ours):
    """diffusers' model of the same arguments; its attention_head_dim is the number of heads (its known misnomer)."""
    depth = ours["transformer_depth"]
    heads = ours["num_heads"] or [width // ours["head_dim"] for width in ours["channels"]]
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=ours["channels"],
        layers_per_block=ours["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        cross_attention_dim=24,
        attention_head_dim=heads,
        use_linear_projection=ours["projection"] == "linear",
        norm_num_groups=ours["norm_groups"],
        resnet_time_scale_shift="scale_shift" if ours["time_conditioning"] == "scale_shift" else "default",
    )


@pytest.mark.parametrize(
    "arguments", [SD15, SD21, {**SD15, "time_conditioning": "scale_shift"}], ids=["sd15", "sd21", "scale_shift"]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_and_gradients_are_equal(arguments, channels_last):
    torch.manual_seed(0)
    theirs = reference(arguments)
    ours = UNet(in_channels=4, context_dim=24, **arguments)
    ours.load_state_dict(unet_from_diffusers(theirs.state_dict()))
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    xt, time, context = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 24)

    expected = theirs(xt, time, context).sample
    actual = ours(xt, time, context)
    assert relative_error(actual, expected) < 1e-5
    actual_gradients, expected_gradients = gradients(ours, actual, theirs, expected)
    distance = torch.linalg.vector_norm(flat(actual_gradients) - flat(expected_gradients))
    assert distance / torch.linalg.vector_norm(flat(expected_gradients)) < 1e-5

    # weight by weight in float64: in float32 some all but cancel, and both sides are up to 8e-6 from the truth
    ours, theirs, xt, context = ours.double(), theirs.double(), xt.double(), context.double()
    actual, expected = ours(xt, time, context), theirs(xt, time, context).sample
    actual_gradients, expected_gradients = gradients(ours, actual, theirs, expected)
    errors = {name: relative_error(actual_gradients[name], g) for name, g in expected_gradients.items()}
    assert max(errors.values()) < 1e-10, max(errors, key=errors.get)


def gradients(ours, actual, theirs, expected):
    """Of the mean square of either output by its weights, under our names."""
    theirs.zero_grad()
    ours.zero_grad()
    expected.square().mean().backward()
    actual.square().mean().backward()
    of_theirs = unet_from_diffusers({name: p.grad for name, p in theirs.named_parameters()})
    return {name: p.grad for name, p in ours.named_parameters()}, of_theirs


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def relative_error(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    ("arguments", "context_dim", "parameters"),
    [
        ({"num_heads": 8, "projection": "conv"}, 768, 859_520_964),
        ({"head_dim": 64, "projection": "linear"}, 1024, 865_910_724),
    ],
    ids=["sd15", "sd21"],
)
def test_the_table_is_a_bijection_at_full_size(arguments, context_dim, parameters):
    """On the meta device: every name and shape of Stable Diffusion's own UNets, both ways."""
    channels, depth = (320, 640, 1280, 1280), (1, 1, 1, 0)
    with torch.device("meta"):
        ours = UNet(
            in_channels=4,
            context_dim=context_dim,
            channels=channels,
            transformer_depth=depth,
            time_conditioning="add",
            **arguments,
        )
        theirs = UNet2DConditionModel(
            cross_attention_dim=context_dim,
            attention_head_dim=8 if "num_heads" in arguments else [5, 10, 20, 20],
            use_linear_projection="head_dim" in arguments,
        )
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert {name: p.shape for name, p in unet_from_diffusers(theirs.state_dict()).items()} == shapes
    assert {name: p.shape for name, p in unet_to_diffusers(ours.state_dict()).items()} == {
        name: p.shape for name, p in theirs.state_dict().items()
    }
