"""LoRA layers against y = base(x) + sum_i scale_i * alpha_i / rank_i * B_i A_i x, for every kind of layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lora_layers import LAYERS, every_layer, fill_b, product, sample, with_weight, wrapped
from torch import nn

from xdiffusion.layers.computed_once import computed_once
from xdiffusion.lora import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    merge_lora_weights,
    set_lora_enabled,
    set_lora_scale,
    unmerge_lora_weights,
)


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_a_fresh_adapter_changes_no_bit(make, shape, grad):
    base, model = wrapped(make, random_b=False)
    x = sample(shape)
    with torch.set_grad_enabled(grad):
        assert torch.equal(model["layer"](x), base(x))
    assert get_lora_parameters(model)[0].abs().sum() > 0  # A is drawn, so that B has a gradient


@every_layer
@pytest.mark.parametrize("grad", [True, False])
def test_the_output_is_the_formulas(make, shape, grad):
    base, model = wrapped(make)
    x = sample(shape)
    expected = with_weight(base, base.weight + product(model["layer"]), x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model["layer"](x), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base(x)).abs().max() > 0.1


@every_layer
def test_the_gradients_are_the_formulas(make, shape):
    base, model = wrapped(make)
    layer, x, expected_x = model["layer"], sample(shape).requires_grad_(), sample(shape).requires_grad_()
    layer(x).square().sum().backward()

    lora_A, lora_B = (p.detach().double().requires_grad_() for p in get_lora_parameters(model))
    delta = torch.einsum("or,r...->o...", lora_B.flatten(1), lora_A) * (2 / 3)
    parameters = {"weight": base.weight.detach().double() + delta}
    parameters |= {} if base.bias is None else {"bias": base.bias.detach().double()}
    torch.func.functional_call(base, parameters, (expected_x.double(),)).square().sum().backward()
    for actual, wanted in ((x, expected_x), (layer.lora_A["default"], lora_A), (layer.lora_B["default"], lora_B)):
        assert (actual.grad - wanted.grad).norm() < 1e-5 * wanted.grad.norm()
    assert layer.weight.grad is None


def test_the_classes_and_names_of_wrapped_layers():
    for name, kind in (("linear", LoRALinear), ("conv1d", LoRAConv1d), ("conv2d", LoRAConv2d)):
        base, model = wrapped(LAYERS[name][0])
        assert type(model["layer"]) is kind
        assert isinstance(model["layer"], type(base))
        assert [n for n in model.state_dict() if "lora" not in n] == ["layer.weight", "layer.bias"]


def test_a_new_lora_linear():
    torch.manual_seed(0)
    layer = LoRALinear(in_features=6, out_features=5, bias=True, rank=2, alpha=8.0, dropout=0.0)
    assert layer.lora_A["default"].shape == (2, 6)
    assert layer.lora_B["default"].shape == (5, 2)
    x = sample((3, 6))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    fill_b(layer)
    branch = 8.0 / 2 * (x @ layer.lora_A["default"].T @ layer.lora_B["default"].T)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + branch)


@every_layer
def test_several_adapters_add_up_by_scale_and_switch(make, shape):
    base, model = wrapped(make, rank=3, alpha=2.0)
    apply_lora_to_model(model, 1, 5.0, 0.0, "all", "second")
    layer, x = model["layer"], sample(shape)
    fill_b(layer)
    deltas = {name: product(layer, name) for name in ("default", "second")}
    for name, delta in deltas.items():
        torch.testing.assert_close(layer.delta(name), delta)

    def check(**strengths):
        weight = base.weight + sum(s * deltas[n] for n, s in strengths.items())
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(x), with_weight(base, weight, x), rtol=1e-4, atol=1e-4)

    check(default=1, second=1)
    set_lora_scale(model, 0.5, "second")
    check(default=1, second=0.5)
    set_lora_enabled(model, False, "default")
    check(second=0.5)
    set_lora_scale(model, -2)
    check(second=-2)
    set_lora_enabled(model, True)
    check(default=-2, second=-2)
    set_lora_enabled(model, False)
    assert torch.equal(layer(x), base(x))


@every_layer
def test_scale_zero_is_the_base_bit_for_bit(make, shape):
    base, model = wrapped(make)
    set_lora_scale(model, 0.0)
    x = sample(shape)
    assert torch.equal(model["layer"](x), base(x))
    with torch.no_grad():
        assert torch.equal(model["layer"](x), base(x))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d grouped", "conv2d unbatched"])
def test_dropout_acts_on_the_branch_in_training_alone(name):
    make, shape = LAYERS[name]
    base, model = wrapped(make, dropout=0.5)
    _, without = wrapped(make)
    layer, x = model["layer"], sample(shape)
    assert torch.equal(layer.eval()(x), without["layer"](x))

    layer.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    branch = with_weight(base, product(layer), dropped) - with_weight(base, torch.zeros_like(base.weight), dropped)
    torch.testing.assert_close(first, base(x) + branch, rtol=1e-4, atol=1e-5)
    set_lora_enabled(model, False)
    assert torch.equal(layer(x), base(x))
    apply_lora_to_model(model, 1, 1.0, 0.0, "all", "without dropout")
    fill_b(layer)
    assert torch.equal(layer(x), layer(x))  # the dropout of an adapter that is off does not act


@every_layer
def test_an_optimizer_step_moves_the_factors_and_no_bit_of_the_base(make, shape):
    base, model = wrapped(make, random_b=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    factors = [p.detach().clone() for p in get_lora_parameters(model)]
    for _ in range(2):  # A has no gradient before B has left zero
        model["layer"](sample(shape)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(factors, get_lora_parameters(model)))
    assert torch.equal(model["layer"].weight, base.weight)
    assert base.bias is None or torch.equal(model["layer"].bias, base.bias)


@every_layer
def test_merging_keeps_the_output_and_unmerging_every_bit(make, shape):
    base, model = wrapped(make)
    set_lora_scale(model, 0.7)
    x, factors = sample(shape), [p.detach().clone() for p in get_lora_parameters(model)]
    before, delta = model["layer"](x).detach(), product(model["layer"])
    state = {n: t.clone() for n, t in model.state_dict().items()}

    merge_lora_weights(model)
    merged = model["layer"]
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not any(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged.weight, base.weight + 0.7 * delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)

    unmerge_lora_weights(model)
    assert torch.equal(model["layer"](x), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(factors, get_lora_parameters(model)))
    assert all(p.requires_grad for p in get_lora_parameters(model))


@every_layer
@torch.no_grad()
def test_a_kept_weight_gives_the_same_until_it_is_dropped(make, shape):
    base, model = wrapped(make)
    layer, x = model["layer"], torch.randn(shape)
    expected = layer(x)
    with computed_once(model):
        assert torch.allclose(layer(x), expected, atol=1e-5)
        kept = layer.kept_weight
        layer(x)
        assert layer.kept_weight is kept
        set_lora_enabled(model, False)
        assert torch.equal(layer(x), base(x))
        set_lora_enabled(model, True)
    layer.lora_B["default"].mul_(2)
    assert layer.kept_weight is None
    assert torch.allclose(layer(x), 2 * expected - base(x), atol=1e-5)
    assert "kept_weight" not in layer.unwrap().__dict__


def test_an_unmerged_layer_is_in_the_mode_the_model_is_in():
    _, model = wrapped(LAYERS["linear"][0], dropout=0.5)
    merge_lora_weights(model.train())
    unmerge_lora_weights(model.eval())
    x = sample((2, 6))
    assert torch.equal(model["layer"](x), model["layer"](x))


@pytest.mark.parametrize("name", ["conv2d", "conv2d 1x1", "conv2d strided, dilated"])
def test_channels_last_stays_and_changes_no_number(name):
    make, shape = LAYERS[name]
    _, model = wrapped(make)
    x = sample(shape)
    expected = model["layer"](x).detach()
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model["layer"](x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=torch.channels_last)
    merge_lora_weights(model)
    assert model["layer"](x).is_contiguous(memory_format=torch.channels_last)
    assert model["layer"].weight.is_contiguous(memory_format=torch.channels_last)


@every_layer
def test_a_bfloat16_base_keeps_factors_in_float32(make, shape):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": make().bfloat16()})
    apply_lora_to_model(model, 3, 2.0, 0.0, "all")
    layer, x = model["layer"], sample(shape).bfloat16()
    fill_b(layer)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in get_lora_parameters(model)} == {torch.float32}
    parameters = {n: p.float() for n, p in layer.named_parameters() if n == "bias"}
    parameters["weight"] = layer.weight.float() + product(layer)
    exact = torch.func.functional_call(make(), parameters, (x.float(),))
    assert (out - exact).norm() < 0.02 * exact.norm()
    torch.testing.assert_close(layer.delta("default"), product(layer))  # in float32, not rounded as W is


@every_layer
def test_autocast_agrees_with_float32(make, shape):
    _, model = wrapped(make)
    x = sample(shape)
    exact = model["layer"](x).detach()
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            out = model["layer"](x)
        assert out.dtype == torch.bfloat16
        assert (out - exact).norm() < 0.02 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        model["layer"](x).float().square().sum().backward()
    assert {p.grad.dtype for p in get_lora_parameters(model)} == {torch.float32}


def test_a_deep_copy_is_apart_and_takes_the_state_dict():
    _, model = wrapped(LAYERS["conv2d"][0])
    x = sample(LAYERS["conv2d"][1])
    expected = model["layer"](x).detach()
    copied = copy.deepcopy(model)
    set_lora_scale(copied, 0.0)
    with torch.no_grad():
        copied["layer"].lora_B["default"].zero_()
    assert torch.equal(model["layer"](x), expected)

    copied.load_state_dict(model.state_dict())
    set_lora_scale(copied, 1.0)
    assert torch.equal(copied["layer"](x), expected)


def test_hooks_of_the_base_layer_live_on():
    base = nn.Linear(6, 5)
    calls = []
    base.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    model = nn.ModuleDict({"layer": base})
    apply_lora_to_model(model, 1, 1.0, 0.0, ["layer"])
    model["layer"](sample((2, 6)))
    merge_lora_weights(model)
    model["layer"](sample((2, 6)))
    assert calls == [LoRALinear, nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank=0 must be in 1\.\.6"),
        ({"rank": 7}, r"rank=7 must be in 1\.\.6"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0\.1 must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(LoRAError, match=message):
        LoRALinear(6, 5, **arguments)


def test_a_taken_adapter_name_is_refused():
    layer = LoRALinear(6, 5, rank=1)
    with pytest.raises(LoRAError, match="an adapter named 'default' already"):
        layer.add_adapter("default", 1, 1.0)
