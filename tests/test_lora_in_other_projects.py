"""A LoRA on a layer that is used in ways that this package does not use it: by keyword, compiled, traced, transformed."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from xdiffusion.lora import (
    apply_lora_to_model,
    load_lora_weights,
    merge_lora_weights,
    save_lora_weights,
    unmerge_lora_weights,
)
from xdiffusion.lora.adapters import remove_lora
from xdiffusion.lora.fold import fold_lora_weights
from xdiffusion.lora.inject import lora_layers
from xdiffusion.lora.settings import LoRAError

LARGE = (2, 1024, 256)  # positions * in * out is beyond SMALL_PRODUCT: a Function of our own


def linear(**options):
    torch.manual_seed(0)
    return apply_lora_to_model(nn.Sequential(nn.Linear(256, 512)), target_modules="all", **options)


def convolution():
    torch.manual_seed(0)
    return apply_lora_to_model(nn.Sequential(nn.Conv2d(16, 16, 3)), target_modules="all")


def with_effect(model):
    for _, layer in lora_layers(model):
        for lora_B in layer.lora_B.values():
            nn.init.normal_(lora_B, std=0.1)
    return model


LARGE_MODELS = {"linear": (linear, LARGE), "convolution": (convolution, (2, 16, 64, 64))}


def test_the_input_has_the_name_that_torch_gives_it():
    for model, size in ((linear(), (3, 256)), (convolution(), (1, 16, 8, 8))):
        x = torch.randn(size)
        assert torch.equal(model[0](input=x), model[0](x))


def test_a_layer_that_was_compiled_by_itself_has_an_effect():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].compile(backend="eager")
    x = torch.randn(2, 8)
    before = model(x)
    with_effect(apply_lora_to_model(model, target_modules="all"))
    assert not torch.allclose(model(x), before)
    model[0].compile(backend="eager")
    remove_lora(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("make", "size"), LARGE_MODELS.values(), ids=LARGE_MODELS)
def test_transforms_of_functions(make, size):
    model = with_effect(make())
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(size)

    def loss(changed, x):
        return torch.func.functional_call(model, changed, (x,)).square().mean()

    loss(parameters, x).backward()
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-6)
    ensemble = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in parameters.items()}
    together = torch.func.vmap(loss, in_dims=(0, None))(ensemble, x)
    apart = [loss({n: p[i] for n, p in ensemble.items()}, x) for i in range(2)]
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("make", "size"), LARGE_MODELS.values(), ids=LARGE_MODELS)
@torch.no_grad()
def test_a_trace_can_be_saved(make, size):
    model, x = with_effect(make()).eval(), torch.randn(size)
    traced = torch.jit.trace(model, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not say that it exports")
def test_an_export_takes_any_batch():
    model = with_effect(apply_lora_to_model(nn.Sequential(nn.Linear(32, 32)), target_modules="all")).eval()
    shapes = {"input": {0: torch.export.Dim("batch", min=2, max=4096)}}
    exported = torch.export.export(model, (torch.randn(6, 32),), dynamic_shapes=shapes).module()
    for batch in (2, 2000):
        x = torch.randn(batch, 32)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 3),
        nn.Conv1d(16, 8, 3),
        nn.Linear(16, 8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_weights_that_lie_in_another_order_give_the_same_bits(layer, generator):
    """Such as those that were transposed out of another framework's."""
    shape = layer.weight.shape
    layer.weight = nn.Parameter(torch.randn(shape[::-1], generator=generator).permute(*reversed(range(len(shape)))))
    x = torch.randn(64, 16, *[12] * (len(shape) - 2), generator=generator)
    model = nn.Sequential(layer)
    before = model(x)
    after = apply_lora_to_model(model, target_modules="all")(x)
    assert torch.equal(after, before) and after.stride() == before.stride()
    fold_lora_weights(model)
    assert model[0].weight.stride() == layer.weight.stride()


def test_a_weight_whose_values_share_memory_is_no_error():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 1).expand(8, 8))
    model = nn.Sequential(layer)
    x = torch.randn(64, 8)
    before = model(x)
    torch.testing.assert_close(apply_lora_to_model(model, target_modules="all")(x), before)


def test_float64_is_never_autocast():
    model = linear().double()
    x = torch.randn(LARGE, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float64


@pytest.mark.parametrize("change", [merge_lora_weights, fold_lora_weights])
def test_weights_that_were_merged_in_inference_mode_can_be_trained_beside(change):
    model = with_effect(linear())
    with torch.inference_mode():
        change(model)
    x = torch.randn(2, 256, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    model.requires_grad_(True)


@pytest.mark.parametrize("formed", [parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
@pytest.mark.parametrize("change", [merge_lora_weights, fold_lora_weights, remove_lora])
def test_a_weight_that_is_formed_anew_by_now_is_refused_and_the_model_stays(formed, change):
    model = with_effect(linear())
    formed(model[0])
    x = torch.randn(2, 256)
    before = model(x)
    with pytest.raises(LoRAError, match="0 forms its weight or bias anew on each call"):
        change(model)
    assert torch.equal(model(x), before)


def test_pissa_of_a_weight_that_is_not_finite_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(LoRAError, match="init='pissa' of 1: its weight is not finite"):
        apply_lora_to_model(model, target_modules="all", init="pissa")
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)


def test_a_lora_is_not_loaded_onto_weights_that_are_not_there(tmp_path):
    save_lora_weights(with_effect(linear()), tmp_path / "lora.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 512))
    with pytest.raises(LoRAError, match="0 has no values yet, it is on the meta device"):
        load_lora_weights(model, tmp_path / "lora.safetensors")
    assert type(model[0]) is nn.Linear


def test_factors_are_float32_whatever_the_default(monkeypatch):
    for init in ("zero_b", "pissa", "orthogonal"):
        try:
            torch.set_default_dtype(torch.bfloat16)
            model = apply_lora_to_model(nn.Sequential(nn.Linear(8, 8)), target_modules="all", init=init)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in (*model[0].lora_A.values(), *model[0].lora_B.values())} == {torch.float32}


def test_groups_that_nothing_captures_are_no_repetition():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o": nn.Linear(4, 4)})])})
    apply_lora_to_model(model, target_modules=r"(?:.*\.)?(?:q|v)_proj")
    assert [name for name, _ in lora_layers(model)] == ["layers.0.q_proj"]


def beit():
    from timm.models.beit import Beit

    torch.manual_seed(0)
    return Beit(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3)


def test_a_projection_that_is_read_without_a_call_is_refused_by_name_and_passed_by_in_a_preset():
    with pytest.raises(LoRAError, match=r"blocks.0.attn.qkv: timm.models.beit.Attention reads its weight without calling it"):
        apply_lora_to_model(beit(), target_modules=["qkv"])
    model = beit()
    with pytest.warns(UserWarning, match=r"pass by 1 layers .* blocks.0.attn.qkv"):
        with_effect(apply_lora_to_model(model, target_modules="all-linear")).eval()
    assert "blocks.0.attn.proj" in dict(lora_layers(model))
    x = torch.randn(1, 3, 16, 16)
    apart = model(x)
    merge_lora_weights(model)
    torch.testing.assert_close(model(x), apart)
    unmerge_lora_weights(model)
    assert torch.equal(model(x), apart)
