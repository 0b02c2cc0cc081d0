"""LoRA layers against y = base(x) + sum_i scale_i * alpha_i / rank_i * B_i A_i x, for every kind of layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xdiffusion.layers.once import computed_once
from xdiffusion.lora import (
    LoRAConv1d,
    LoRAConv2d,
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    lora_disabled,
    merge_lora_weights,
    set_lora_enabled,
    set_lora_scale,
    unmerge_lora_weights,
)

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 9, 6)),
    "linear of few tokens": (lambda: nn.Linear(6, 5, bias=False), (1, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    "conv1d strided": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "conv2d strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2), padding=1), (2, 4, 8, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 6, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 6)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def wrapped(make, rank=3, alpha=2.0, dropout=0.0, random_b=True, **variant):
    """(base layer, model with the wrapped copy of it in `model.layer`)."""
    torch.manual_seed(0)
    base = make()
    model = nn.ModuleDict({"layer": copy.deepcopy(base)})
    apply_lora_to_model(model, rank, alpha, dropout, "all", **variant)
    if random_b:
        fill_b(model["layer"])
    return base, model


def fill_b(layer):
    with torch.no_grad():
        for factor in layer.lora_B.values():
            factor.normal_(generator=torch.Generator().manual_seed(2))


def sample(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def with_weight(base, weight, x):
    """What a layer like `base` with another weight gives."""
    other = copy.deepcopy(base)
    other.weight = nn.Parameter(weight.detach())
    return other(x)


def product(layer, name="default"):
    """alpha / rank * B A, entry by entry."""
    lora_A, lora_B = layer.lora_A[name].detach(), layer.lora_B[name].detach()
    settings = layer.adapters[name]
    total = torch.zeros(layer.weight.shape)
    for r in range(settings.rank):
        total += torch.einsum("o,...->o...", lora_B[:, r].flatten(), lora_A[r])
    return settings.lora_alpha / settings.rank * total


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


# variants


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
        ({"init": "pissa", "rank": 2, "alpha": 0.0}, "init='pissa' needs a lora_alpha above 0, not 0"),
    ],
)
def test_beginnings_that_cannot_be(variant, message):
    model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    with pytest.raises(LoRAError, match=message):
        apply_lora_to_model(model, target_modules="all", **variant)
    assert type(model["layer"]) is nn.Linear


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
