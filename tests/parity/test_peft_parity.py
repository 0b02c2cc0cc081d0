"""Our adapters beside peft's: the same base weights and factors, then output, gradients and merged weights."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from xdiffusion.lora import apply_lora_to_model
from xdiffusion.lora.inject import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # we do want several adapters
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (3, 40, 12)),
    "linear of few tokens": (lambda: nn.Linear(12, 10, bias=False), (2, 12)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 9, 9)),
    "conv2d of few pixels": (lambda: nn.Conv2d(8, 16, 3), (1, 8, 4, 4)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(8, 6, 1, stride=2, bias=False), (2, 8, 9, 9)),
}
VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(make, adapters):
    """(our layer, peft's) with adapters {name: (rank, alpha, variant)}, all active, whose factors are random."""
    torch.manual_seed(0)
    ours = nn.Sequential(make())
    theirs = copy.deepcopy(ours)
    for name, (rank, alpha, variant) in adapters.items():
        apply_lora_to_model(ours, rank, alpha, 0.0, "all", name, **variant)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **variant), theirs, name)
    ours, theirs = ours[0].requires_grad_(True), theirs[0]
    theirs.set_adapter(list(adapters))
    with torch.no_grad():
        for seed, name in enumerate(adapters):
            ours.lora_B[name].copy_(0.3 * random(*ours.lora_B[name].shape, seed=seed))
            for mine, peft in parameters(ours, theirs, name):
                if mine.dim() == 1:
                    mine.mul_(1 + 0.2 * random(*mine.shape, seed=seed))
                peft.copy_(mine.view_as(peft))
    for layer in (ours.weight, ours.bias):
        if layer is not None:
            layer.requires_grad_(False)
    return ours, theirs


def parameters(ours, theirs, name):
    """Pairs of the same parameter: A, B and, of DoRA, the magnitude."""
    yield ours.lora_A[name], theirs.lora_A[name].weight
    yield ours.lora_B[name], theirs.lora_B[name].weight
    if ours.adapters[name].use_dora:
        yield ours.lora_magnitude[name], theirs.lora_magnitude_vector[name].weight


def assert_near(actual, expected):
    """To 1e-5 of the largest entry."""
    assert (actual - expected.view_as(actual)).abs().max() < 1e-5 * expected.abs().max()


def assert_same(ours, theirs, shape, names):
    x, their_x = (random(*shape, seed=9).requires_grad_() for _ in range(2))
    out, expected = ours(x), theirs(their_x)
    assert_near(out, expected)
    weights = random(*out.shape, seed=8)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_near(x.grad, their_x.grad)
    for name in names:
        for mine, peft in parameters(ours, theirs, name):
            assert_near(mine.grad, peft.grad)


@every_layer
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_output_and_gradients(make, shape, variant):
    ours, theirs = both(make, {"default": (3, 5.0, variant)})
    assert_same(ours, theirs, shape, ["default"])


@every_layer
def test_several_active_adapters(make, shape):
    adapters = {"a": (2, 5.0, {}), "b": (3, 2.0, VARIANTS["DoRA"]), "c": (1, 4.0, VARIANTS["rsLoRA"])}
    ours, theirs = both(make, adapters | {"d": (2, 3.0, VARIANTS["DoRA"])})
    assert_same(ours, theirs, shape, [*adapters, "d"])


@every_layer
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_merged_weights(make, shape, variant):
    ours, theirs = both(make, {"default": (3, 5.0, variant)})
    theirs.merge()
    assert_near(ours.effective_weight().detach(), theirs.base_layer.weight)


@pytest.mark.parametrize("variant", [VARIANTS["LoRA"], VARIANTS["rsLoRA"]], ids=["LoRA", "rsLoRA"])
def test_pissa_starts_and_learns_alike_though_only_peft_changes_the_base(variant):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(12, 10))
    theirs, base = copy.deepcopy(ours), ours[0].weight.detach().clone()
    apply_lora_to_model(ours, 3, 6.0, target_modules="all", init="pissa", **variant)
    config = LoraConfig(r=3, lora_alpha=6.0, target_modules=["0"], init_lora_weights="pissa", **variant)
    inject_adapter_in_model(config, theirs)
    for mine, peft in parameters(ours[0], theirs[0], "default"):
        assert_near(mine.abs(), peft.abs())  # a singular vector's sign is anybody's guess
        peft.data.copy_(mine)
    assert torch.equal(ours[0].weight, base)
    assert_same(ours[0], theirs[0], (5, 12), ["default"])
    with torch.no_grad():
        for mine, peft in parameters(ours[0], theirs[0], "default"):
            mine.add_(0.1 * random(*mine.shape))
            peft.copy_(mine)
    ours.zero_grad()
    theirs.zero_grad()
    assert_same(ours[0], theirs[0], (5, 12), ["default"])


def test_patterns_mean_the_same_layers():
    patterns = {"rank_pattern": {"a.to_q": 1, r".*\.to_k": 2, "out.0": 3}, "alpha_pattern": {"to_[qv]": 8, "0": 5}}
    block = lambda: nn.ModuleDict({n: nn.Linear(8, 8) for n in ("to_q", "to_k", "to_v")})  # noqa: E731
    ours = nn.ModuleDict({"a": block(), "b": block(), "out": nn.Sequential(nn.Linear(8, 8))})
    theirs = copy.deepcopy(ours)
    apply_lora_to_model(ours, 4, 2.0, target_modules="all", **patterns)
    targets = ["to_q", "to_k", "to_v", "out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2.0, target_modules=targets, **patterns), theirs)
    found = {n: (layer.adapters["default"].rank, layer.adapters["default"].lora_alpha) for n, layer in lora_layers(ours)}
    assert found == {n: (theirs.get_submodule(n).r["default"], theirs.get_submodule(n).lora_alpha["default"]) for n in found}
    assert len(set(found.values())) > 3
