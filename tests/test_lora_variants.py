"""rsLoRA, DoRA, PiSSA and orthogonal beginnings, in every kind of layer, against their formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lora_layers import LAYERS, every_layer, fill_b, product, sample, with_weight, wrapped
from torch import nn

from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    lora_disabled,
    merge_lora_weights,
    set_lora_scale,
    unmerge_lora_weights,
)


def dora_by_hand(weight, update, magnitude):
    """Output by output: the direction of W + update at the length `magnitude`."""
    return torch.stack([m * (w + u) / (w + u).norm() for w, u, m in zip(weight, update, magnitude)])


def test_rslora_divides_by_the_root_of_the_rank():
    _, plain = wrapped(LAYERS["linear"][0], rank=4, alpha=6.0)
    _, stable = wrapped(LAYERS["linear"][0], rank=4, alpha=6.0, use_rslora=True)
    assert (plain["layer"].adapters["default"].scaling, stable["layer"].adapters["default"].scaling) == (1.5, 3.0)
    torch.testing.assert_close(stable["layer"].delta("default"), 2 * plain["layer"].delta("default"))


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_a_fresh_dora_changes_no_bit(make, shape, grad):
    base, model = wrapped(make, random_b=False, use_dora=True)
    x = sample(shape)
    with torch.set_grad_enabled(grad):
        assert torch.equal(model["layer"](x), base(x))
    assert model["layer"].lora_magnitude["default"].shape == (len(base.weight),)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doras_output_is_the_formulas(make, shape, dtype):
    base, model = wrapped(make, use_dora=True)
    base, model, x = base.to(dtype), model.to(dtype), sample(shape).to(dtype)
    layer = model["layer"]
    for parameter in get_lora_parameters(model):
        parameter.data = parameter.data.float()
    with torch.no_grad():
        layer.lora_magnitude["default"].mul_(torch.linspace(0.5, 1.5, len(base.weight)))
    magnitude = layer.lora_magnitude["default"].detach()
    weight = dora_by_hand(base.weight.float(), product(layer), magnitude)
    expected = with_weight(base, weight.to(dtype), x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.delta("default"), weight - base.weight.float())
    assert layer(x).dtype == dtype


@every_layer
def test_doras_lengths_of_a_weight_in_half_precision_are_not_rounded(make, shape):
    model = nn.ModuleDict({"layer": make().bfloat16()})
    apply_lora_to_model(model, 1, target_modules="all", use_dora=True)
    lengths = model["layer"].weight.double().flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(model["layer"].lora_magnitude["default"].double(), lengths, rtol=1e-6, atol=0)


@every_layer
def test_a_scale_of_dora_lies_between_the_base_and_as_trained(make, shape):
    base, model = wrapped(make, use_dora=True)
    layer = model["layer"]
    for scale in (0.0, 0.3, 1.0, 1.5):
        set_lora_scale(model, scale)
        torch.testing.assert_close(layer.effective_weight(), base.weight + scale * layer.delta("default"))
    set_lora_scale(model, 0.0)
    assert torch.equal(layer(sample(shape)), base(sample(shape)))


def test_adapters_act_in_their_order_and_a_norm_is_that_of_the_base():
    base, model = wrapped(LAYERS["conv2d"][0])
    apply_lora_to_model(model, 2, 3.0, 0.0, "all", "second", use_dora=True)
    layer = model["layer"]
    fill_b(layer)
    first, second = product(layer), product(layer, "second")
    norm = (base.weight + second).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    length = base.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = length / norm * (base.weight + first + second)
    torch.testing.assert_close(layer.effective_weight(), expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped"])
def test_the_dropout_of_dora_acts_on_its_update(name):
    make, shape = LAYERS[name]
    base, model = wrapped(make, dropout=0.5, use_dora=True)
    layer, x = model["layer"].train(), sample(shape)
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    update = with_weight(base, layer.effective_weight(), dropped) - base(dropped)
    torch.testing.assert_close(out, base(x) + update, rtol=1e-4, atol=1e-5)
    assert not torch.equal(out, layer.eval()(x))


STARTS = {"pissa": {"init": "pissa", "rank": 2}, "orthogonal": {"init": "orthogonal", "rank": 2}}


@every_layer
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_other_beginnings_change_the_output_by_rounding_alone(make, shape, start, variant):
    base, model = wrapped(make, random_b=False, **start, **variant)
    x = sample(shape)
    torch.testing.assert_close(model["layer"](x), base(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(model["layer"].weight, base.weight)
    assert all(p.abs().sum() > 0 for p in get_lora_parameters(model))  # A and B both learn from the first step on
    model["layer"](x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in get_lora_parameters(model)}
    assert all(p.grad.abs().sum() > 0 for p in trained)


def test_orthogonal_factors_are_as_large_as_pefts():
    """Orthonormal rows leave the length of a random matrix as it is: half the rank of normal numbers over 10."""
    model = apply_lora_to_model(nn.Sequential(nn.Linear(300, 200)), 16, init="orthogonal", target_modules="all")
    for factor, size in zip(get_lora_parameters(model), (300, 200)):
        assert factor.norm().item() == pytest.approx(math.sqrt(size * 8) / 10, rel=0.1)


def test_pissa_takes_the_principal_part_of_the_weight():
    base, model = wrapped(LAYERS["linear"][0], rank=2, alpha=6.0, init="pissa", random_b=False)
    left, values, right = torch.linalg.svd(base.weight)
    principal = left[:, :2] @ values[:2].diag() @ right[:2]
    torch.testing.assert_close(product(model["layer"]), principal)
    assert model["layer"].delta("default").abs().max() < 1e-6


@every_layer
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@pytest.mark.parametrize("start", [{"init": "zero_b"}, *STARTS.values()], ids=["zero_b", *STARTS])
def test_factors_say_all_that_an_adapter_does(make, shape, start, variant):
    """Also of PiSSA, whose file is a plain LoRA of twice the rank on the untouched base."""
    base, model = wrapped(make, **start, **variant)
    for parameter in get_lora_parameters(model):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    other = nn.ModuleDict({"layer": copy.deepcopy(base)})
    apply_lora_to_model(other, 1, 1.0, 0.0, "all")
    factors = model["layer"].factors("default")
    other["layer"].set_factors("default", factors)
    x = sample(shape)
    torch.testing.assert_close(other["layer"](x), model["layer"](x), rtol=1e-4, atol=1e-5)
    if not variant.get("use_dora"):
        torch.testing.assert_close(factors.delta(), model["layer"].delta("default"), rtol=1e-4, atol=1e-6)
    assert other["layer"].factors("default").lora_alpha == factors.lora_alpha


def test_factors_of_the_same_shape_are_overwritten_in_place():
    _, first = wrapped(LAYERS["conv2d"][0], use_dora=True)
    _, second = wrapped(LAYERS["conv2d"][0], alpha=7.0)
    layer = first["layer"]
    set_lora_scale(first, 0.5)
    layer.adapters["default"].dropout = 0.25
    before = layer.lora_A["default"], layer.lora_B["default"]
    layer.set_factors("default", second["layer"].factors("default"))
    assert all(a is b for a, b in zip(before, (layer.lora_A["default"], layer.lora_B["default"])))
    assert "default" not in layer.lora_magnitude
    settings = layer.adapters["default"]
    assert (settings.lora_alpha, settings.scale, settings.dropout, settings.use_dora) == (7.0, 0.5, 0.25, False)
    torch.testing.assert_close(layer.delta("default"), second["layer"].delta("default"))


def test_factors_that_are_put_in_are_copies():
    """Of another rank, so that no parameter is overwritten: training the layer they came from changes nothing here."""
    layers = [wrapped(LAYERS["linear"][0], rank=rank)[1]["layer"] for rank in (2, 3)]
    layers[0].set_factors("default", layers[1].factors("default"))
    before = layers[0].delta("default").detach()
    for factor in (layers[1].lora_A, layers[1].lora_B):
        factor["default"].data.zero_()
    assert before.any() and torch.equal(layers[0].delta("default"), before)


def test_factors_of_another_layer_are_refused():
    _, linear = wrapped(LAYERS["linear"][0])
    _, conv = wrapped(LAYERS["conv2d"][0])
    before = copy.deepcopy(linear["layer"].adapters)
    with pytest.raises(LoRAError, match=r"weight \(5, 6\), which the factors A \(3, 4, 3, 3\)"):
        linear["layer"].set_factors("default", conv["layer"].factors("default"))
    assert linear["layer"].adapters == before


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"init": "orthogonal", "rank": 3}, "rank=3 must be even for init='orthogonal'"),
        ({"init": "pissa", "rank": 4}, r"rank=4 of init='pissa' must be in 1\.\.3 for layer, a weight \(5, 6\)"),
        ({"init": "pissa", "rank": 2, "alpha": 0.0}, "lora_alpha=0.0 of layer must be a number above 0 for"),
    ],
)
def test_beginnings_that_cannot_be(variant, message):
    model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    with pytest.raises(LoRAError, match=message):
        apply_lora_to_model(model, target_modules="all", **variant)
    assert type(model["layer"]) is nn.Linear


@pytest.mark.parametrize("alpha", [0, math.nan, -math.inf])
def test_a_layer_of_its_own_refuses_an_alpha_that_turns_it_off(alpha):
    with pytest.raises(LoRAError, match=f"lora_alpha={alpha} must be a number other than 0"):
        LoRALinear(4, 4, rank=2, alpha=alpha)


@every_layer
def test_dora_merges_and_unmerges(make, shape):
    base, model = wrapped(make, use_dora=True)
    x = sample(shape)
    before = model["layer"](x).detach()
    merge_lora_weights(model)
    torch.testing.assert_close(model["layer"](x), before, rtol=1e-4, atol=1e-5)
    unmerge_lora_weights(model)
    assert torch.equal(model["layer"](x), before)
    with lora_disabled(model):
        assert torch.equal(model["layer"](x), base(x))
