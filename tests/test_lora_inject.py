"""Which layers get an adapter: names and patterns, and what is refused."""

import math
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from lora_layers import fill_b
from torch import nn

from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    load_lora_weights,
    lora_disabled,
    merge_lora_weights,
    remove_lora,
    save_lora_weights,
    set_lora_enabled,
    set_lora_scale,
    unmerge_lora_weights,
)
from xdiffusion.lora.inject import lora_layers, target_names


def small_model():
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict({"to_q": nn.Linear(4, 4), "not_to_q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})  # noqa: E731
    return nn.ModuleDict({"a": block(), "b": block(), "conv": nn.Conv1d(4, 4, 3)})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["to_q"], ["a.to_q", "b.to_q"]),  # an ending is a whole part of the name: not_to_q does not match
        (["a.to_q"], ["a.to_q"]),
        (["a.to_q", "conv"], ["a.to_q", "conv"]),
        (("to_q", "not_to_q"), ["a.to_q", "a.not_to_q", "b.to_q", "b.not_to_q"]),
        (r"a\..*", ["a.to_q", "a.not_to_q"]),
        (r".*\.to_q|conv", ["a.to_q", "b.to_q", "conv"]),
    ],
)
def test_lists_and_patterns(targets, expected):
    model = small_model()
    assert target_names(model, targets) == expected
    apply_lora_to_model(model, target_modules=targets)
    assert [name for name, _ in lora_layers(model)] == expected
    assert target_names(model, targets) == expected  # wrapped layers have the same names


@pytest.fixture
def without_type_checks(monkeypatch):
    """As in use, where annotations are not looked at."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["to_w"]}, r"no layer of ModuleDict matches .* \['to_w'\]; allowed: attention, "),
        ({"target_modules": "to_q"}, "named like a.to_q, a.not_to_q, conv"),  # a pattern must match the whole name
        ({"target_modules": "a"}, "no layer"),
        ({"target_modules": []}, "no layer"),
        ({"target_modules": ["norm"]}, "no layer"),
        ({"target_modules": "("}, r"LoRA targets '\(' are neither of attention, .* nor a regular expression"),
        ({"rank": 0}, r"rank=0 must be in 1\.\.4 for a.to_q"),
        ({"rank": 5}, r"rank=5 must be in 1\.\.4"),
        ({"rank": 5, "target_modules": ["conv", "to_q"]}, r"rank=5 must be in 1\.\.4 for a.to_q"),  # conv could: 12
        ({"dropout": 1.0}, r"dropout=1\.0 must be in \[0, 1\)"),
        ({"adapter_name": "first"}, "a.to_q has an adapter named 'first' already"),
        ({"adapter_name": "first", "target_modules": "all"}, "a.to_q has an adapter named 'first' already"),
        ({"adapter_name": "v1.5"}, "adapter_name='v1.5'"),
        ({"adapter_name": "keys"}, "adapter_name='keys'"),
        ({"init": "zero_a"}, "init='zero_a' must be one of zero_b, pissa, orthogonal"),
        ({"init": None}, "init=None must be one of"),
        ({"rank": 2.0}, r"rank=2\.0 must be a whole number in 1\.\.4 for a.to_q"),
        ({"rank": True}, r"rank=True must be a whole number in 1\.\.4"),
        ({"rank": "2"}, r"rank='2' must be a whole number in 1\.\.4"),
        ({"rank_pattern": {"b.to_q": 2.5}}, r"rank=2\.5 must be a whole number in 1\.\.4 for b.to_q"),
        ({"alpha": "1"}, "lora_alpha='1' of a.to_q must be a number"),
        ({"alpha_pattern": {"b.to_q": None}}, "lora_alpha=None of b.to_q must be a number"),
        ({"dropout": math.nan}, r"dropout=nan must be in \[0, 1\)"),
        ({"dropout": "0"}, r"dropout='0' must be in \[0, 1\)"),
        ({"adapter_name": ""}, "adapter_name='' must"),
        ({"adapter_name": "training"}, "adapter_name='training' must"),  # an attribute of every module
        ({"adapter_name": 7}, "adapter_name=7 must"),
    ],
)
def test_a_refused_call_leaves_the_model_as_it_was(arguments, message, without_type_checks):
    model = small_model()
    apply_lora_to_model(model, 1, 1.0, 0.0, ["a.to_q"], "first")
    model["b"].requires_grad_(True)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(LoRAError, match=message):
        apply_lora_to_model(model, **{"target_modules": ["to_q"], "adapter_name": "second"} | arguments)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert [name for name, _ in lora_layers(model)] == ["a.to_q"]


def test_numbers_of_numpy_become_plain_ones(without_type_checks, tmp_path):
    """A header of JSON knows no others."""
    numbers = np.int64(2), np.float32(3.0), np.float32(0.5)
    model = apply_lora_to_model(small_model(), *numbers, ["to_q"])
    (_, layer), *_ = lora_layers(model)
    settings = layer.adapters["default"]
    assert [type(n) for n in (settings.rank, settings.lora_alpha, settings.dropout)] == [int, float, float]
    save_lora_weights(model, tmp_path / "lora.safetensors")


def test_freezing_leaves_the_newest_adapter_trainable():
    model = small_model()
    apply_lora_to_model(model, 1, target_modules=["a.to_q"])
    apply_lora_to_model(model, 2, target_modules=["to_q"], adapter_name="second")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.to_q.lora_{x}.second" for m in "ab" for x in "AB"}


def test_get_lora_parameters():
    model = small_model()
    assert get_lora_parameters(model) == []
    apply_lora_to_model(model, 1, target_modules=["a.to_q"])
    apply_lora_to_model(model, 2, target_modules=["to_q"], adapter_name="second")
    shapes = lambda name: [tuple(p.shape) for p in get_lora_parameters(model, name)]  # noqa: E731
    assert shapes("default") == [(1, 4), (4, 1)]
    assert shapes("second") == [(2, 4), (4, 2)] * 2
    assert len(get_lora_parameters(model)) == 6
    assert {id(p) for p in get_lora_parameters(model)} == {id(p) for n, p in model.named_parameters() if ".lora_" in n}
    assert shapes("third") == []


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", None])
def test_a_scale_that_is_no_number_is_refused(scale, without_type_checks):
    model = apply_lora_to_model(small_model(), target_modules=["to_q"])
    with pytest.raises(LoRAError, match=f"LoRA scale={scale!r} must be a finite number"):
        set_lora_scale(model, scale)
    assert [layer.adapters["default"].scale for _, layer in lora_layers(model)] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_a_layer_of_its_own_refuses_such_names_too(name):
    layer = LoRALinear(4, 4, rank=1)
    with pytest.raises(LoRAError, match=f"adapter_name={name!r} must"):
        layer.add_adapter(name, 1, 1.0)
    with pytest.raises(LoRAError, match=f"adapter_name={name!r} must"):
        layer.set_factors(name, layer.factors("default"))
    assert list(layer.adapters) == list(layer.lora_A) == ["default"]


@pytest.mark.parametrize(("setting", "value"), [(set_lora_enabled, False), (set_lora_scale, 0.0)])
def test_setting_what_is_not_there_is_an_error(setting, value):
    model = small_model()
    with pytest.raises(LoRAError, match="ModuleDict has no LoRA adapter"):
        setting(model, value)
    apply_lora_to_model(model, target_modules=["a.to_q"])
    with pytest.raises(LoRAError, match="ModuleDict has no LoRA adapter named 'other'"):
        setting(model, value, "other")
    assert model["a"]["to_q"].adapters["default"].strength == 0.25


def test_merging_and_unmerging_in_the_wrong_state_is_an_error():
    model = small_model()
    with pytest.raises(LoRAError, match=r"no LoRA adapter to merge$"):
        merge_lora_weights(model)
    with pytest.raises(LoRAError, match="is not merged"):
        unmerge_lora_weights(model)
    apply_lora_to_model(model, target_modules=["to_q"])
    with pytest.raises(LoRAError, match="is not merged"):
        unmerge_lora_weights(model)
    merge_lora_weights(model)
    with pytest.raises(LoRAError, match="no LoRA adapter to merge: it is merged already"):
        merge_lora_weights(model)
    for doing in (set_lora_enabled, partial(set_lora_scale, scale=0.0), lambda m: lora_disabled(m).__enter__()):
        with pytest.raises(LoRAError, match=r"a\.to_q is merged: call unmerge_lora_weights before (switching|changing)"):
            doing(model)
    with pytest.raises(LoRAError, match="only inside a model"):
        merge_lora_weights(LoRALinear(4, 4))


def test_the_public_walk_from_base_to_deployment(tmp_path):
    """The calls that a user makes, in their order: apply, train, compare, save, load, merge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x, target = torch.randn(32, 4), torch.randn(32, 4)
    base_output = model(x).detach()
    model = apply_lora_to_model(model, rank=4, alpha=4.0, target_modules=["0", "2"])
    optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=0.03)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    tuned = model(x).detach()
    set_lora_enabled(model, enabled=False)
    assert torch.equal(model(x), base_output)
    set_lora_enabled(model, enabled=True)
    assert torch.equal(model(x), tuned)

    save_lora_weights(model, tmp_path / "my_lora_weights.safetensors")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    load_lora_weights(other, str(tmp_path / "my_lora_weights.safetensors"))
    torch.testing.assert_close(other(x), tuned)
    merge_lora_weights(other)
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in other)
    torch.testing.assert_close(other(x), tuned)


def test_a_merged_layer_takes_no_new_adapter():
    model = apply_lora_to_model(nn.Sequential(nn.Linear(4, 4)), rank=1, target_modules="all")
    merge_lora_weights(model)
    with pytest.raises(LoRAError, match="unmerge_lora_weights"):
        apply_lora_to_model(model, rank=1, target_modules="all", adapter_name="second")


def settings_of(model):
    found = {n: layer.adapters["default"] for n, layer in lora_layers(model)}
    return {n: (s.rank, s.lora_alpha) for n, s in found.items()}


def test_ranks_and_alphas_by_pattern():
    model = small_model()
    patterns = {"rank_pattern": {"to_q": 1, r"a\..*": 3}, "alpha_pattern": {"b.to_q": 8.0, "conv": 0.5}}
    apply_lora_to_model(model, 2, 4.0, target_modules="all", **patterns)
    assert settings_of(model) == {
        "a.to_q": (1, 4.0),  # the first pattern that matches counts
        "a.not_to_q": (3, 4.0),  # to_q matches a name or an ending behind a dot
        "b.to_q": (1, 8.0),
        "b.not_to_q": (2, 4.0),
        "conv": (2, 0.5),
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"rank_pattern": {"to_w": 2}}, "rank_pattern: 'to_w' matches none of the targeted layers, named like a.to_q"),
        ({"alpha_pattern": {"conv": 2.0}}, "alpha_pattern: 'conv' matches none"),  # it is no target here
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"b.to_q": 9}}, r"rank=9 must be in 1\.\.4 for b.to_q"),
    ],
)
def test_patterns_that_cannot_be_leave_the_model_as_it_was(patterns, message):
    model = small_model()
    with pytest.raises(LoRAError, match=message):
        apply_lora_to_model(model, 2, target_modules=["to_q"], **patterns)
    assert lora_layers(model) == []


def test_a_layer_of_two_names_is_wrapped_at_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"first": shared}), "decoder": nn.Sequential(shared, shared)})
    for targets in (["encoder.first"], ["decoder.0"], "decoder.1", "all"):
        apply_lora_to_model(model, 1, target_modules=targets)
        assert [name for name, _ in lora_layers(model)] == ["encoder.first"]  # a layer is known by its first name
        layer = model["encoder"]["first"]
        assert layer is model["decoder"][0] is model["decoder"][1]
        fill_b(model)
        adapted = layer(torch.ones(4))
        merge_lora_weights(model)
        for plain in (model["encoder"]["first"], *model["decoder"]):
            assert type(plain) is nn.Linear
            torch.testing.assert_close(plain(torch.ones(4)), adapted)
        unmerge_lora_weights(model)
        remove_lora(model)
        assert model["encoder"]["first"] is model["decoder"][0] is model["decoder"][1]


def test_a_layer_that_torchs_fast_path_would_pass_by_is_refused():
    """nn.TransformerEncoderLayer reads linear1 and linear2 without calling them in evaluation."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    with pytest.raises(LoRAError, match=r"layers\.0\.linear1: the fast path .*set_fastpath_enabled\(False\)"):
        apply_lora_to_model(model, 1, target_modules="all")
    assert lora_layers(model) == []
    x = torch.randn(1, 3, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = inferred_by(model, x)
        apply_lora_to_model(model, 1, target_modules="all")
        assert torch.equal(inferred_by(model, x), expected)
        fill_b(model)
        assert not torch.allclose(inferred_by(model, x), expected, atol=1e-2)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@torch.no_grad()
def inferred_by(model, x):
    return model(x)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_vv"], "'to_vv' of the LoRA targets matches no layer of ModuleDict, .* near to it: to_v"),
        (["a.to_v", "c.to_q"], "'c.to_q' of .* near to it: .*a.to_q"),
        (["to_q", "norm"], "'norm' of the LoRA targets matches no layer"),  # it cannot have an adapter
        (["to_q", "xyz"], "'xyz' of .* matches no layer of ModuleDict, a Linear or a convolution$"),
    ],
)
def test_an_entry_of_a_list_that_matches_nothing_is_refused(targets, message):
    block = lambda: nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})  # noqa: E731
    model = nn.ModuleDict({"a": block(), "b": block()})
    with pytest.raises(LoRAError, match=message):
        apply_lora_to_model(model, 2, target_modules=targets)
    assert lora_layers(model) == [] and all(p.requires_grad for p in model.parameters())


def test_a_part_that_reads_its_weights_without_a_call_is_refused():
    from open_clip.modified_resnet import AttentionPool2d

    model = nn.ModuleDict({"attnpool": AttentionPool2d(7, 32, 4, 16)})
    with pytest.raises(LoRAError, match=r"attnpool\.[qkvc]_proj: open_clip.* reads its weight without calling it"):
        apply_lora_to_model(model)
    assert not lora_layers(model)
