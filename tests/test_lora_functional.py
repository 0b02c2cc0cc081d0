"""The merged LoRA function against the formula it stands for, written out."""

import pytest
import torch
from torch.autograd import gradcheck

from xdiffusion.lora.functional import lora_linear, merged_weight, merging_pays

IN, OUT, RANK, SCALING = 6, 5, 2, 0.75
MANY, FEW = (3, 8), (2,)  # leading shapes of x for which merging pays, and does not


def inputs(leading=MANY, dtype=torch.float32, bias=True, trains=("x", "lora_A", "lora_B")):
    """x, weight, bias, lora_A, lora_B; those named in `trains` require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*leading, IN), "weight": (OUT, IN), "bias": (OUT,), "lora_A": (RANK, IN), "lora_B": (OUT, RANK)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    for name in trains:
        tensors[name].requires_grad_()
    return [tensors[name] if bias or name != "bias" else None for name in shapes]


def formula(x, weight, bias, lora_A, lora_B):
    """Every output as a sum, with no library layer."""
    out = torch.einsum("...i,oi->...o", x, weight) + SCALING * torch.einsum("...i,ri,or->...o", x, lora_A, lora_B)
    return out if bias is None else out + bias


def is_merged(out):
    return "MergedLinear" in type(out.grad_fn).__name__


@pytest.mark.parametrize("leading", [MANY, FEW, ()], ids=["merged", "plain", "one vector"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_formulas(leading, bias):
    tensors, expected_tensors = inputs(leading, bias=bias), inputs(leading, bias=bias)
    out, expected = lora_linear(*tensors, SCALING), formula(*expected_tensors)
    assert is_merged(out) == (leading == MANY)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for actual, wanted in zip(tensors, expected_tensors):
        if actual is not None and actual.requires_grad:
            torch.testing.assert_close(actual.grad, wanted.grad)


@pytest.mark.parametrize("leading", [MANY, FEW])
def test_gradients_in_float64_are_the_finite_differences(leading):
    x, weight, bias, lora_A, lora_B = inputs(leading, torch.float64)
    assert gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALING), (x, lora_A, lora_B))


def test_one_input_feature_and_no_leading_dimension():
    """The one case in which merging pays for a single vector."""
    x, lora_B = torch.tensor([2.0], requires_grad=True), torch.ones(3, 1, requires_grad=True)
    out = lora_linear(x, torch.ones(3, 1), None, torch.full((1, 1), 5.0), lora_B, 1.0)
    assert is_merged(out)
    out.sum().backward()
    assert out.tolist() == [12.0] * 3
    assert x.grad.tolist() == [18.0]
    assert lora_B.grad.flatten().tolist() == [10.0] * 3


@pytest.mark.parametrize("leading", [MANY, FEW])
def test_zero_b_changes_no_bit(leading):
    x, weight, bias, lora_A, lora_B = inputs(leading, trains=())
    out = lora_linear(x, weight, bias, lora_A, torch.zeros_like(lora_B), SCALING)
    assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_base_that_trains_gets_its_gradients(trained):
    trains = (trained, "x", "lora_A", "lora_B")
    tensors, expected_tensors = inputs(trains=trains), inputs(trains=trains)
    out = lora_linear(*tensors, SCALING)
    assert not is_merged(out)
    out.square().sum().backward()
    formula(*expected_tensors).square().sum().backward()
    for actual, wanted in zip(tensors, expected_tensors):
        assert (actual.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-4, atol=1e-4)


def test_frozen_parts_get_no_graph():
    x, weight, bias, lora_A, lora_B = inputs(trains=("lora_B",))
    out = lora_linear(x, weight, bias, lora_A, lora_B, SCALING)
    assert [node is not None for node, _ in out.grad_fn.next_functions] == [False, False, False, False, True]
    out.sum().backward()
    assert lora_A.grad is None
    assert lora_B.grad is not None


def test_without_gradients_there_is_no_graph():
    assert lora_linear(*inputs(trains=()), SCALING).grad_fn is None
    with torch.no_grad():
        assert lora_linear(*inputs(trains=("weight", "x", "lora_A")), SCALING).grad_fn is None


@pytest.mark.parametrize("leading", [MANY, FEW])
def test_autocast_computes_in_bfloat16_and_keeps_the_factors_in_float32(leading):
    tensors, exact_tensors = inputs(leading), inputs(leading)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear(*tensors, SCALING)
    exact = formula(*exact_tensors)
    assert out.dtype == torch.bfloat16
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()
    out.float().square().sum().backward()
    exact.square().sum().backward()
    for actual, wanted in zip(tensors, exact_tensors):
        if actual.requires_grad:
            assert actual.grad.dtype == torch.float32
            assert (actual.grad - wanted.grad).norm() < 0.02 * wanted.grad.norm()


def test_merging_pays_where_it_multiplies_less():
    for tokens, i, o in [(1, 4, 4), (2, 4, 4), (3, 4, 4), (16384, 128, 128), (100, 768, 768), (400, 768, 768)]:
        with_merged_weight = 4 * i * o
        with_branch = tokens * (4 * i + 4 * o)
        assert merging_pays(torch.empty(tokens, i), torch.empty(o, i)) == (with_merged_weight < with_branch)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 3, 2)])
def test_merged_weight_of_any_kernel(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    lora_A = torch.randn(RANK, *shape[1:], generator=generator)
    lora_B = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
    expected = weight + SCALING * sum(
        torch.einsum("o,...->o...", lora_B[:, r].flatten(), lora_A[r]) for r in range(RANK)
    )
    merged = merged_weight(weight, lora_A, lora_B, SCALING)
    torch.testing.assert_close(merged, expected)


def test_merged_weight_keeps_layout_and_rounds_once():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator).bfloat16().to(memory_format=torch.channels_last)
    lora_A, lora_B = torch.randn(2, 3, 3, 3, generator=generator), torch.randn(4, 2, 1, 1, generator=generator)
    merged = merged_weight(weight, lora_A, lora_B, SCALING)
    assert merged.is_contiguous(memory_format=torch.channels_last)
    exact = weight.double() + SCALING * torch.einsum("or,r...->o...", lora_B.double()[:, :, 0, 0], lora_A.double())
    assert torch.equal(merged, exact.bfloat16())
