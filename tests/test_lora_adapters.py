"""Several adapters in one model: taken away, swapped, switched off for a while, merged one by one, folded for good."""

import copy

import pytest
import torch
from torch import nn

from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    fold_lora_weights,
    get_lora_parameters,
    lora_disabled,
    merge_lora_weights,
    remove_lora,
    set_lora_enabled,
    set_lora_scale,
    swap_lora,
    unmerge_lora_weights,
)
from xdiffusion.lora.inject import lora_layers


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(4, 3))


def adapted(adapters, **variant):
    """The model with adapters {name: targets}, their B random."""
    model = base_model()
    for seed, (name, targets) in enumerate(adapters.items()):
        apply_lora_to_model(model, 2, 3.0, target_modules=targets, adapter_name=name, **variant)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                if name in layer.adapters:
                    layer.lora_B[name].normal_(generator=torch.Generator().manual_seed(seed))
    return model


def two_adapters():
    return adapted({"a": "all", "b": ["0", "3"]})


def sample():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def copies(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# removing


def test_removing_one_adapter_leaves_the_other():
    model, alone = two_adapters(), adapted({"a": "all"})  # the first adapter draws the same factors in both
    remove_lora(model, "b")
    assert torch.equal(model(sample()), alone(sample()))
    assert equal_bits(copies(model), copies(alone))


@pytest.mark.parametrize("names", [[None], ["a", "b"], ["b", "a"]])
def test_without_its_last_adapter_a_layer_is_the_plain_one_bit_for_bit(names):
    model, base = two_adapters(), base_model()
    weight = model[0].weight
    for name in names:
        remove_lora(model, name)
    assert [type(layer) for layer in model] == [type(layer) for layer in base]
    assert model[0].weight is weight
    assert equal_bits(copies(model), copies(base))
    assert torch.equal(model(sample()), base(sample()))
    apply_lora_to_model(model, 1, target_modules="all")  # and it can be wrapped again


def test_a_layer_that_only_one_adapter_has_becomes_plain():
    model = two_adapters()
    remove_lora(model, "a")
    assert [name for name, _ in lora_layers(model)] == ["0", "3"]
    assert type(model[5]) is nn.Linear


def test_removing_what_is_not_there_or_partly_merged_is_an_error():
    with pytest.raises(LoRAError, match="Sequential has no LoRA adapter"):
        remove_lora(base_model())
    model = two_adapters()
    with pytest.raises(LoRAError, match="has no LoRA adapter named 'c'"):
        remove_lora(model, "c")
    merge_lora_weights(model, "a")
    with pytest.raises(LoRAError, match="0 is merged: call unmerge_lora_weights before removing"):
        remove_lora(model, "b")


def test_doras_magnitude_is_one_of_the_parameters_and_goes_with_its_adapter():
    model = adapted({"a": ["0"]}, use_dora=True)
    assert [tuple(p.shape) for p in get_lora_parameters(model)] == [(2, 6), (8, 2), (8,)]
    remove_lora(model)
    assert equal_bits(copies(model), copies(base_model()))


# for a while


def test_disabled_for_a_while_each_adapter_comes_back_as_it_was():
    model, base = two_adapters(), base_model()
    set_lora_enabled(model, False, "b")
    before = model(sample())
    with pytest.raises(ZeroDivisionError), lora_disabled(model):
        assert torch.equal(model(sample()), base(sample()))
        raise ZeroDivisionError
    assert torch.equal(model(sample()), before)
    assert [layer.adapters["b"].enabled for _, layer in lora_layers(model) if "b" in layer.adapters] == [False, False]
    with lora_disabled(base):
        pass


# merging one of several


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_merging_and_unmerging_one_by_one(order):
    model = two_adapters()
    set_lora_scale(model, 0.6, "b")
    before, state = model(sample()).detach(), copies(model)
    for name in order:
        merge_lora_weights(model, name)
        torch.testing.assert_close(model(sample()), before)
    assert lora_layers(model) == []
    assert type(model[0]) is nn.Linear
    for name in order:
        unmerge_lora_weights(model, name)
        torch.testing.assert_close(model(sample()), before)
    assert torch.equal(model(sample()), before)
    assert equal_bits(copies(model), state)


def test_what_stays_apart_can_still_be_steered():
    model, expected = two_adapters(), two_adapters()
    parameter = model[0].lora_A["b"]
    merge_lora_weights(model, "a")
    assert type(model[0]) is LoRALinear
    assert type(model[5]) is nn.Linear
    assert model[0].lora_A["b"] is parameter
    assert list(model[0].adapters) == ["b"]
    for scale in (-0.5, 0.0):
        set_lora_scale(model, scale, "b")
        set_lora_scale(expected, scale, "b")
        torch.testing.assert_close(model(sample()), expected(sample()))
    unmerge_lora_weights(model)
    assert torch.equal(model(sample()), expected(sample()))


def test_unmerging_the_rest_or_all():
    model = two_adapters()
    before = model(sample()).detach()
    merge_lora_weights(model)
    unmerge_lora_weights(model, "b")
    assert list(model[0].adapters) == ["b"]
    assert type(model[5]) is nn.Linear
    torch.testing.assert_close(model(sample()), before)
    merge_lora_weights(model)
    assert lora_layers(model) == []
    unmerge_lora_weights(model)
    assert torch.equal(model(sample()), before)


def test_merging_one_in_the_wrong_state_is_an_error():
    model = two_adapters()
    with pytest.raises(LoRAError, match=r"no LoRA adapter named 'c' to merge$"):
        merge_lora_weights(model, "c")
    with pytest.raises(LoRAError, match="'a' is not merged"):
        unmerge_lora_weights(model, "a")
    merge_lora_weights(model, "a")
    with pytest.raises(LoRAError, match="'b' is not merged"):
        unmerge_lora_weights(model, "b")
    with pytest.raises(LoRAError, match="no LoRA adapter named 'a' to merge: it is merged already"):
        merge_lora_weights(model, "a")
    dora = adapted({"a": "all", "b": "all"}, use_dora=True)
    with pytest.raises(LoRAError, match=r"0 has a DoRA adapter, .*: merge all at once"):
        merge_lora_weights(dora, "a")
    assert len(lora_layers(dora)) == 3


# folding


@pytest.mark.parametrize("merged_before", [(), ("a",), ("a", "b")])
def test_folding_is_for_good(merged_before):
    model = two_adapters()
    before = model(sample()).detach()
    expected = [model[i].effective_weight().detach() for i in (0, 3, 5)]
    for name in merged_before:
        merge_lora_weights(model, name)
    fold_lora_weights(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in base_model()]
    assert all(torch.equal(model[i].weight, weight) for i, weight in zip((0, 3, 5), expected))
    torch.testing.assert_close(model(sample()), before)
    with pytest.raises(LoRAError, match="is not merged"):
        unmerge_lora_weights(model)
    with pytest.raises(LoRAError, match="has no LoRA to fold"):
        fold_lora_weights(model)
    apply_lora_to_model(model, 1, target_modules="all")
    torch.testing.assert_close(model(sample()), before)


# swapping


def factors_of(model, name):
    return {n: layer.factors(name) for n, layer in lora_layers(model) if name in layer.adapters}


def test_a_swap_makes_the_adapter_exactly_the_new_one():
    """Another rank, another variant, layers that the old one has alone and layers that the new one has alone."""
    model, other = two_adapters(), adapted({"x": ["3", "5"]}, use_dora=True)
    swap_lora(other, factors_of(adapted({"a": "all"}, rank_pattern={"5": 1}), "a"), "x")
    set_lora_scale(model, 0.5, "b")
    expected = copy.deepcopy(model)
    remove_lora(expected, "b")
    swap_lora(expected, factors_of(other, "x"), "b")
    set_lora_scale(expected, 0.5, "b")
    kept = model[3].lora_A["b"]
    swap_lora(model, factors_of(other, "x"), "b")
    assert model[3].lora_A["b"] is kept
    assert model[5].adapters["b"].rank == 1
    assert torch.equal(model(sample()), expected(sample()))
    swap_lora(model, {"5": factors_of(other, "x")["5"]}, "b")
    assert ["b" in layer.adapters for _, layer in lora_layers(model)] == [False, False, True]
    assert model[5].adapters["b"].scale == 0.5
    swap_lora(model, {}, "b")
    with pytest.raises(LoRAError, match="has no LoRA adapter named 'b'"):
        set_lora_scale(model, 1.0, "b")


def test_a_swap_leaves_each_layer_its_own_switch_and_strength():
    model = adapted({"a": "all"})
    model[3].adapters["a"].enabled, model[5].adapters["a"].scale = False, 0.25
    swap_lora(model, factors_of(adapted({"x": "all"}), "x"), "a")
    settings = [layer.adapters["a"] for _, layer in lora_layers(model)]
    assert [(each.enabled, each.scale) for each in settings] == [(True, 1.0), (False, 1.0), (True, 0.25)]


def test_a_layer_that_a_swap_adds_is_as_strong_and_drops_out_as_the_others():
    model = apply_lora_to_model(base_model(), 2, dropout=0.25, target_modules=["0"])
    set_lora_scale(model, 0.5)
    set_lora_enabled(model, False)
    swap_lora(model, factors_of(adapted({"a": ["0", "5"]}), "a"))
    settings = [layer.adapters["default"] for _, layer in lora_layers(model)]
    assert [(each.dropout, each.scale, each.enabled) for each in settings] == 2 * [(0.25, 0.5, False)]


def test_a_swap_into_a_plain_model_is_a_load():
    model = base_model()
    swap_lora(model, factors_of(adapted({"a": ["0"]}), "a"))
    torch.testing.assert_close(model(sample()), adapted({"a": ["0"]})(sample()))
    swap_lora(model, {})
    assert equal_bits(copies(model), copies(base_model()))


@pytest.mark.parametrize(
    ("name", "message"),
    [("7", "no unmerged layer named 7"), ("1", "no unmerged layer named 1"), ("5", r"5 has weight \(3, 4\), which")],
)
def test_a_swap_that_does_not_fit_changes_nothing(name, message):
    model = two_adapters()
    before = copies(model)
    factors = factors_of(model, "a")
    with pytest.raises(LoRAError, match=message):
        swap_lora(model, {"0": factors_of(adapted({"x": ["0"]}), "x")["0"], name: factors["0"]}, "b")
    assert equal_bits(copies(model), before)
    merge_lora_weights(model)
    with pytest.raises(LoRAError, match="no unmerged layer named 0"):
        swap_lora(model, factors, "a")


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_an_adapter_s_dropout_is_its_own(variant):
    """A trained adapter computes as before while a new one is trained beside it with dropout."""
    model = adapted({"old": "all"}, **variant)
    expected = model(sample())
    apply_lora_to_model(model, 2, 3.0, dropout=0.5, target_modules="all", adapter_name="new", **variant)
    torch.testing.assert_close(model.train()(sample()), expected)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B["new"].normal_()
    assert not torch.equal(model(sample()), model(sample()))
    many = model[0](sample().repeat(20_000, 1)).unflatten(0, (20_000, -1))
    torch.testing.assert_close(many.mean(0), model[0].eval()(sample()), rtol=0.1, atol=0.1)
