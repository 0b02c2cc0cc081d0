"""Layers that are more than nn.Linear or a convolution: which take a LoRA, and which are refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lora_layers import fill_b
from torch import nn
from torch.nn.utils import parametrizations, prune

from xdiffusion.layers.convolution import Conv3x3
from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    load_lora_weights,
    merge_lora_weights,
    remove_lora,
    save_lora_weights,
    swap_lora,
    unmerge_lora_weights,
)
from xdiffusion.lora.inject import lora_layers


class Named(nn.Linear):
    """Computes as nn.Linear does, with a constructor, a method and an attribute of its own."""

    def __init__(self, size, label):
        super().__init__(size, size)
        self.label = label

    def describe(self):
        return f"{self.label} of {self.in_features}"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """As timm's ScaledStdConv2d and Conv2dSame: another forward."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Negated(nn.Conv1d):
    def _conv_forward(self, input, weight, bias):
        return -super()._conv_forward(input, weight, bias)


def patched():
    """As accelerate's hooks do it."""
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


OWN_FORWARD = {
    "linear": lambda: Scaled(4, 4),
    "conv2d": lambda: Standardised(4, 4, 1),
    "conv1d": lambda: Negated(4, 4, 1),
    "patched": patched,
}
each_own_forward = pytest.mark.parametrize("make", OWN_FORWARD.values(), ids=OWN_FORWARD)


def kinds_of(model):
    return {name: (type(module), id(module)) for name, module in model.named_modules()}


def assert_refused(model, message, change):
    """That `change` says so and leaves the model's modules, and what of it is trained, as they were."""
    before, trained = kinds_of(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoRAError, match=message):
        change(model)
    assert kinds_of(model) == before
    assert [p.requires_grad for p in model.parameters()] == trained


# subclasses that compute as their base


@pytest.mark.parametrize(("make", "size"), [(lambda: Named(4, "a"), (2, 4)), (lambda: Conv3x3(4, 4), (2, 4, 5, 5))])
def test_a_subclass_that_keeps_its_bases_forward_stays_what_it_is(make, size):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(size)
    plain, expected = type(model[0]), model(x).detach()
    apply_lora_to_model(model, 2, target_modules="all")
    assert isinstance(model[0], plain) and torch.equal(model(x), expected)
    fill_b(model)
    adapted = model(x).detach()
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    merge_lora_weights(model)
    assert type(model[0]) is plain
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)
    unmerge_lora_weights(model)
    assert torch.equal(model(x), adapted)
    remove_lora(model)
    assert type(model[0]) is plain and torch.equal(model(x), expected)


def test_what_a_subclass_can_do_it_can_do_with_a_lora():
    model = apply_lora_to_model(nn.Sequential(Named(4, "a"), nn.Linear(4, 4)), 2, target_modules="all")
    assert model[0].describe() == "a of 4"
    assert type(model[1]) is LoRALinear
    apply_lora_to_model(model, 1, target_modules="all", adapter_name="second")
    merge_lora_weights(model, "second")
    assert model[0].describe() == "a of 4" and list(model[0].adapters) == ["default"]
    remove_lora(unmerged(model))
    assert type(model[0]) is Named


def unmerged(model):
    unmerge_lora_weights(model)
    return model


@pytest.mark.parametrize("name", ["LoRACompatibleLinear", "LoRACompatibleConv"])
def test_old_diffusers_layers_are_plain_ones_while_their_own_lora_is_none(name):
    lora = pytest.importorskip("diffusers.models.lora")
    torch.manual_seed(0)
    layer = getattr(lora, name)(4, 4) if name.endswith("Linear") else lora.LoRACompatibleConv(4, 4, 1)
    model, x = nn.Sequential(layer), torch.randn((2, 4) if name.endswith("Linear") else (2, 4, 3, 3))
    expected = model(x).detach()
    apply_lora_to_model(model, 2, target_modules="all")
    assert torch.equal(model(x), expected)
    remove_lora(model)
    assert type(model[0]) is type(layer)
    layer.lora_layer = nn.Identity()
    assert_refused(nn.Sequential(layer), name, lambda model: apply_lora_to_model(model, 2, target_modules=["0"]))


# a forward of their own


@each_own_forward
@pytest.mark.parametrize("targets", [["own"], ["plain", "own"], "plain|own"])
def test_a_layer_with_its_own_forward_is_refused_by_name(make, targets):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "own": make()})
    message = rf"own is a {type(model['own']).__name__} with a forward of its own"
    assert_refused(model, message, lambda model: apply_lora_to_model(model, 2, target_modules=targets))


@each_own_forward
def test_a_preset_passes_it_by_and_says_so(make):
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "own": make()})
    with pytest.warns(UserWarning, match=r"'all' pass by 1 layers .* such as own, "):
        apply_lora_to_model(model, 2, target_modules="all")
    assert [name for name, _ in lora_layers(model)] == ["plain"]
    model = nn.ModuleDict({"own": make()})
    assert_refused(model, "own is a", lambda model: apply_lora_to_model(model, 2, target_modules="all"))


@each_own_forward
def test_no_file_and_no_swap_gives_it_one(make, tmp_path):
    own = make()
    like = nn.Linear(4, 4) if isinstance(own, nn.Linear) else nn.Conv1d(4, 4, 1)
    like = nn.Conv2d(4, 4, 1) if isinstance(own, nn.Conv2d) else like
    source = apply_lora_to_model(nn.ModuleDict({"own": like}), 2, target_modules="all")
    fill_b(source)
    save_lora_weights(source, tmp_path / "lora.safetensors")
    model = nn.ModuleDict({"own": own})
    assert_refused(model, "own is a", lambda model: load_lora_weights(model, tmp_path / "lora.safetensors"))
    factors = {"own": source["own"].factors("default")}
    assert_refused(model, "own is a", lambda model: swap_lora(model, factors))


# weights that are formed on each call, or not yet there

FORMED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 1)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "prune": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
    "of the bias": lambda: parametrizations.weight_norm(nn.Linear(4, 4), "bias", dim=None),
}


@pytest.mark.parametrize("targets", ["all", ["0", "1"]])
@pytest.mark.parametrize("make", FORMED.values(), ids=FORMED)
def test_a_weight_that_is_formed_on_each_call_is_refused(make, targets):
    model = nn.Sequential(nn.Linear(4, 4), make())
    message = "1 forms its weight or bias anew on each call"
    assert_refused(model, message, lambda model: apply_lora_to_model(model, 2, target_modules=targets))


@pytest.mark.parametrize("targets", ["all", ["0", "1"]])
def test_a_lazy_layer_is_refused_until_it_has_seen_an_input(targets):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    apply = lambda model: apply_lora_to_model(model, 2, target_modules=targets)  # noqa: E731
    assert_refused(model, "1 has no weight yet: call the model once", apply)
    source = apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert_refused(model, "1 has no weight yet", lambda model: swap_lora(model, {"1": source[1].factors("default")}))
    x = torch.ones(1, 4)
    expected = model(x)
    assert torch.equal(apply(model)(x), expected)


# pickles


@pytest.mark.parametrize("make", [lambda: Named(4, "a"), lambda: Conv3x3(4, 4)], ids=["subclass", "conv3x3"])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])  # torch.save's, and that of processes
def test_a_lora_on_a_subclass_can_be_pickled_merged_or_not(make, protocol):
    plain = nn.Sequential(make())
    model = apply_lora_to_model(copy.deepcopy(plain), 2, target_modules="all")
    fill_b(model)
    x = torch.randn((2, 4) if isinstance(plain[0], nn.Linear) else (2, 4, 5, 5))
    expected = model(x)
    read = pickle.loads(pickle.dumps(model, protocol))
    assert type(read[0]) is type(model[0]) and torch.equal(read(x), expected)
    merge_lora_weights(model)
    read = pickle.loads(pickle.dumps(model, protocol))
    assert type(read[0]) is type(plain[0])
    assert torch.equal(unmerged(read)(x), expected)
    remove_lora(read)
    assert torch.equal(read(x), plain(x))
