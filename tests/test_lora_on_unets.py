"""Presets of target layers, and a whole life of an adapter, on our UNet, on a diffusers UNet and on text encoders."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention as TheirAttention
from lora_layers import fill_b
from tiny import copies, equal_bits
from torch import nn

from xdiffusion.layers.attention import Attention
from xdiffusion.lora import (
    LoRAError,
    apply_lora_to_model,
    get_lora_parameters,
    load_lora_weights,
    merge_lora_weights,
    save_lora_weights,
    unmerge_lora_weights,
)
from xdiffusion.lora.inject import lora_layers, target_names
from xdiffusion.networks.unet import UNet
from xdiffusion.text_encoders.clip import CLIPTextEncoder


def our_unet(**arguments):
    torch.manual_seed(0)
    unet = UNet(in_channels=1, context_dim=12, channels=(16, 32), transformer_depth=(0, 1), num_res_blocks=1,
                head_dim=8, norm_groups=4, **arguments)  # fmt: skip
    with torch.no_grad():
        for parameter in unet.parameters():  # away from the zeros that a fresh network starts from
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def diffusers_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def call(unet):
    generator = torch.Generator().manual_seed(0)
    xt, context = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    out = unet(xt, torch.tensor([3.0, 700.0]), context)
    return out if torch.is_tensor(out) else out.sample


@torch.no_grad()
def inferred(unet):
    return call(unet)


def names_below(model, kind, classes):
    """The names of all `classes` inside modules of class `kind`."""
    outer = [name for name, module in model.named_modules() if isinstance(module, kind)]
    return {
        f"{prefix}.{name}"
        for prefix in outer
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, classes)
    }


def names_of(model, classes):
    return {name for name, module in model.named_modules() if isinstance(module, classes)}


def test_presets_on_our_unet():
    unet = our_unet()
    attention = names_below(unet, Attention, nn.Linear)
    transformers = {n for n in names_of(unet, nn.Linear) if ".attentions." in n}
    assert len(attention) == 4 * 2 * 4  # blocks: down 1, middle 1, up 2; self- and cross-attention; q, k, v, out
    assert attention < transformers < names_of(unet, nn.Linear)
    assert set(target_names(unet, "attention")) == attention
    assert set(target_names(unet, "attention+mlp")) == transformers
    assert set(target_names(unet, "all-linear")) == names_of(unet, nn.Linear)
    assert set(target_names(unet, "all")) == names_of(unet, (nn.Linear, nn.Conv2d))


def test_presets_on_a_diffusers_unet():
    unet = diffusers_unet()
    attention = names_below(unet, TheirAttention, nn.Linear)
    mlp = names_below(unet, FeedForward, nn.Linear)
    mlp |= {n for n in names_of(unet, nn.Conv2d) if n.endswith(("proj_in", "proj_out"))}
    assert len(attention) == 4 * 2 * 4
    assert set(target_names(unet, "attention")) == attention
    assert set(target_names(unet, "attention+mlp")) == attention | mlp
    assert set(target_names(unet, "all")) == names_of(unet, (nn.Linear, nn.Conv2d))


def test_presets_on_text_encoders():
    ours = CLIPTextEncoder(width=8, layers=2, heads=2, context_length=4)
    inside = {n for n in names_of(ours, nn.Linear) if n != "text_projection"}
    assert set(target_names(ours, "attention")) == {n for n in inside if ".attn." in n}
    assert set(target_names(ours, "attention+mlp")) == inside
    theirs = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")})
    assert target_names(theirs, "attention") == ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.mark.parametrize("preset", ["attention", "attention+mlp", "all-linear", "all"])
@pytest.mark.parametrize("make", [our_unet, diffusers_unet])
def test_a_wrapped_unet_is_the_unet_and_learns_and_merges(make, preset, tmp_path):
    unet = make()
    expected, base = call(unet).detach(), copies(unet.state_dict())
    assert apply_lora_to_model(unet, rank=2, alpha=4.0, target_modules=preset) is unet
    assert torch.equal(call(unet), expected)

    call(unet).square().sum().backward()
    assert all(p.grad is None for n, p in unet.named_parameters() if ".lora_" not in n)
    assert all(p.grad.abs().sum() > 0 for n, p in unet.named_parameters() if ".lora_B" in n)

    fill_b(unet)
    adapted = inferred(unet)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert relative_error(call(unet).detach(), adapted) < 1e-4
    save_lora_weights(unet, tmp_path / "lora.safetensors")
    merge_lora_weights(unet)
    assert lora_layers(unet) == []
    assert unet.state_dict().keys() == base.keys()
    assert relative_error(inferred(unet), adapted) < 1e-4
    unmerge_lora_weights(unet)
    assert torch.equal(inferred(unet), adapted)
    assert equal_bits({n: p for n, p in unet.state_dict().items() if ".lora_" not in n}, base)

    other = make()
    load_lora_weights(other, tmp_path / "lora.safetensors")
    assert torch.equal(inferred(other), adapted)


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_our_unets_own_variants_wrap():
    """The layout, the layers that are left out, and gradient checkpointing do not stand in the way."""
    unet = our_unet(projection="none", qk_norm=True, patch_size=2).to(memory_format=torch.channels_last)
    expected = call(unet).detach()
    apply_lora_to_model(unet, 2, 4.0, 0.0, "all")
    assert torch.equal(call(unet), expected)
    fill_b(unet)
    call(unet).square().sum().backward()
    plain = [p.grad.clone() for p in get_lora_parameters(unet)]
    unet.zero_grad()
    unet.gradient_checkpointing = True
    call(unet).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, get_lora_parameters(unet)))


@pytest.mark.parametrize("targets", ["attention", "all-linear", "all", ["out_proj"], ".*"])
def test_multihead_attention_is_not_broken(targets):
    """nn.MultiheadAttention reads its out_proj without calling it: an adapter there would be trained for nothing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "to_q": nn.Linear(8, 8)})
    assert "attention.out_proj" not in target_names(model, "all")
    x = torch.randn(3, 1, 8)
    expected, _ = model["attention"](x, x, x)
    if targets == ["out_proj"]:
        with pytest.raises(LoRAError, match="no layer of ModuleDict matches"):
            apply_lora_to_model(model, target_modules=targets)
    else:
        apply_lora_to_model(model, target_modules=targets)
        assert [name for name, _ in lora_layers(model)] == ["to_q"]
    actual, _ = model["attention"](x, x, x)
    assert torch.equal(actual, expected)
