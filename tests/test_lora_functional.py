"""The merged LoRA functions against the formulas they stand for, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from xdiffusion.lora.functional import Geometry, dora_weight, lora_conv, lora_linear, merged_weight, merging_pays

IN, OUT, RANK, SCALING = 6, 5, 2, 0.75
MANY, FEW = (3, 8), (2,)  # leading shapes of x for which merging pays, and does not


@pytest.fixture(autouse=True, params=["large weight", "small product"])
def small_weight(request, monkeypatch):
    """The weights of these tests count as large, or as small, whose gradient automatic differentiation finds."""
    monkeypatch.setattr("xdiffusion.lora.functional.SMALL_PRODUCT", 10**9 if request.param == "small product" else 0)
    return request.param == "small product"


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
def test_forward_and_gradients_are_the_formulas(leading, bias, small_weight):
    tensors, expected_tensors = inputs(leading, bias=bias), inputs(leading, bias=bias)
    out, expected = lora_linear(*tensors, SCALING), formula(*expected_tensors)
    assert is_merged(out) == (leading == MANY and not small_weight)
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


def test_one_input_feature_and_no_leading_dimension(small_weight):
    """The one case in which merging pays for a single vector."""
    x, lora_B = torch.tensor([2.0], requires_grad=True), torch.ones(3, 1, requires_grad=True)
    out = lora_linear(x, torch.ones(3, 1), None, torch.full((1, 1), 5.0), lora_B, 1.0)
    assert is_merged(out) != small_weight
    out.sum().backward()
    assert out.tolist() == [12.0] * 3
    assert x.grad.tolist() == [18.0]
    assert lora_B.grad.flatten().tolist() == [10.0] * 3


@pytest.mark.parametrize("leading", [MANY, FEW])
def test_zero_b_changes_no_bit(leading):
    x, weight, bias, lora_A, lora_B = inputs(leading, trains=())
    out = lora_linear(x, weight, bias, lora_A, torch.zeros_like(lora_B), SCALING)
    assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
@pytest.mark.parametrize("leading", [MANY, FEW])
def test_factors_of_lower_precision_leave_the_weight_as_exact_as_it_is(leading, kinds):
    of_weight, of_factors = kinds
    x, weight, bias, lora_A, lora_B = inputs(leading, of_weight)
    lora_A, lora_B = (factor.detach().to(of_factors) for factor in (lora_A, lora_B))
    torch.testing.assert_close(
        lora_linear(x, weight, bias, lora_A, lora_B * 0, SCALING), F.linear(x, weight, bias), rtol=0, atol=0
    )
    exact = weight + SCALING * lora_B.to(of_weight) @ lora_A.to(of_weight)
    torch.testing.assert_close(merged_weight(weight, lora_A, lora_B, SCALING), exact)


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


def test_frozen_parts_get_no_graph(small_weight):
    if small_weight:
        pytest.skip("automatic differentiation draws its own graph")
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
def test_on_the_meta_device_there_are_shapes_and_no_autocast(leading):
    tensors = [tensor.to("meta") for tensor in inputs(leading)]
    assert lora_linear(*tensors, SCALING).shape == (*leading, OUT)


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
        assert merging_pays(tokens, torch.empty(o, i)) == (with_merged_weight < with_branch)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 3, 2)])
def test_merged_weight_of_any_kernel(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    lora_A = torch.randn(RANK, *shape[1:], generator=generator)
    lora_B = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
    expected = weight + SCALING * sum(torch.einsum("o,...->o...", lora_B[:, r].flatten(), lora_A[r]) for r in range(RANK))
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 1, 3, 3), (4, 3, 1, 1), (4, 1, 1, 1), (4, 1, 3, 1), (4, 3, 1, 3)])
def test_merged_weight_has_the_strides_of_the_weight(shape, layout):
    """Where a shape fits both layouts, strides alone tell them apart, and a convolution looks at them."""
    weight = torch.empty(shape, memory_format=layout).normal_()
    lora_A, lora_B = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1)
    merged = merged_weight(weight, lora_A, lora_B, SCALING)
    assert merged.stride() == weight.stride()
    torch.testing.assert_close(
        merged, merged_weight(weight.clone(memory_format=torch.contiguous_format), lora_A, lora_B, SCALING)
    )
    assert torch.equal(merged_weight(weight, lora_A, torch.zeros_like(lora_B), SCALING), weight)


# convolutions

CONVS = {  # shape of x, of the weight, geometry, whether merging pays
    "2d": ((2, 4, 9, 9), (5, 4, 3, 3), Geometry((1, 1), (1, 1), (1, 1)), True),
    "2d strided, dilated": ((2, 4, 12, 13), (5, 4, 3, 2), Geometry((2, 1), (1, 0), (1, 2)), True),
    "2d 1x1": ((2, 4, 5, 5), (5, 4, 1, 1), Geometry((1, 1), (0, 0), (1, 1)), True),
    "2d of few pixels": ((1, 4, 1, 1), (5, 4, 3, 3), Geometry((1, 1), (1, 1), (1, 1)), False),
    "1d": ((2, 4, 20), (5, 4, 3), Geometry((2,), (1,), (1,)), True),
}
every_conv = pytest.mark.parametrize(("x_shape", "shape", "geometry", "merged"), CONVS.values(), ids=CONVS)


def conv_inputs(x_shape, shape, dtype=torch.float32):
    """x, weight, bias, lora_A, lora_B; all but the base require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [x_shape, shape, shape[:1], (RANK, *shape[1:]), (shape[0], RANK, *[1] * (len(shape) - 2))]
    tensors = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]


def conv_formula(x, weight, bias, lora_A, lora_B, geometry):
    """A convolution with the whole W', as autograd differentiates it."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv1d
    whole = weight + SCALING * torch.einsum("or,r...->o...", lora_B.flatten(1), lora_A)
    return convolve(x, whole, bias, *geometry)


@every_conv
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_and_its_gradients_are_the_formulas(x_shape, shape, geometry, merged, channels_last):
    tensors, expected_tensors = conv_inputs(x_shape, shape), conv_inputs(x_shape, shape)
    if channels_last and len(shape) == 4:
        tensors[:2] = [t.detach().to(memory_format=torch.channels_last) for t in tensors[:2]]
        tensors[0].requires_grad_()
    out, expected = lora_conv(*tensors, SCALING, geometry), conv_formula(*expected_tensors, geometry)
    assert ("MergedConv" in type(out.grad_fn).__name__) == merged
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for actual, wanted in zip(tensors, expected_tensors):
        if wanted.requires_grad:
            assert (actual.grad - wanted.grad).norm() < 1e-5 * wanted.grad.norm()


@every_conv
def test_a_convolutions_gradients_in_float64_are_the_finite_differences(x_shape, shape, geometry, merged):
    x, weight, bias, lora_A, lora_B = conv_inputs(x_shape, shape, torch.float64)
    assert gradcheck(lambda x, a, b: lora_conv(x, weight, bias, a, b, SCALING, geometry), (x, lora_A, lora_B), fast_mode=True)


def test_frozen_parts_of_a_convolution_get_no_graph():
    x, weight, bias, lora_A, lora_B = (t.detach() for t in conv_inputs(*CONVS["2d"][:2]))
    out = lora_conv(x, weight, bias, lora_A, lora_B.requires_grad_(), SCALING, CONVS["2d"][2])
    assert [node is not None for node, _ in out.grad_fn.next_functions] == [False, False, False, False, True]
    out.sum().backward()
    assert lora_B.grad is not None


# DoRA


def dora_inputs(dtype=torch.float64):
    """weight, base, lora_A, lora_B, scaling, magnitude: as for a second adapter, after one that moved the weight."""
    _, base, _, lora_A, lora_B = inputs(dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    weight = base + 0.1 * torch.randn(base.shape, generator=generator, dtype=dtype)
    magnitude = torch.rand(OUT, generator=generator, dtype=dtype) + 0.5
    return weight, base, lora_A, lora_B, SCALING, magnitude.requires_grad_()


def test_dora_is_the_formula():
    weight, base, lora_A, lora_B, scaling, magnitude = (t.detach() if torch.is_tensor(t) else t for t in dora_inputs())
    result = dora_weight(weight, base, lora_A, lora_B, scaling, magnitude)
    for o in range(OUT):
        update = scaling * sum(lora_B[o, r] * lora_A[r] for r in range(RANK))
        length = (base[o] + update).square().sum().sqrt()
        torch.testing.assert_close(result[o], magnitude[o] * (weight[o] + update) / length)
    alone = dora_weight(base, base, lora_A, lora_B, scaling, magnitude)
    torch.testing.assert_close(alone.norm(dim=1), magnitude)  # the magnitude is the length, hence its name


def test_doras_gradients_are_those_with_a_constant_norm():
    weight, base, lora_A, lora_B, scaling, magnitude = dora_inputs()
    norm = (base + scaling * lora_B @ lora_A).norm(dim=1).detach()

    def with_constant_norm(lora_A, lora_B, magnitude):
        return (magnitude / norm)[:, None] * (weight + scaling * lora_B @ lora_A)

    trained = (lora_A, lora_B, magnitude)
    assert gradcheck(with_constant_norm, trained)
    weights = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = torch.autograd.grad((with_constant_norm(*trained) * weights).sum(), trained)
    result = dora_weight(weight, base, lora_A, lora_B, scaling, magnitude)
    for actual, wanted in zip(torch.autograd.grad((result * weights).sum(), trained), expected):
        torch.testing.assert_close(actual, wanted)
    assert gradcheck(lambda m: dora_weight(weight, base, lora_A.detach(), lora_B.detach(), scaling, m), (magnitude,))


def test_an_output_without_weight_stays_zero_under_dora():
    _, _, lora_A, _, scaling, _ = dora_inputs()
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    result = dora_weight(zero, zero, lora_A, zero[:, :RANK], scaling, torch.zeros(OUT, dtype=torch.float64))
    assert torch.equal(result, zero)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradients_of_gradients_are_the_formulas(kind):
    """A gradient penalty reaches the factors; W' as a saved number would not be theirs any more."""
    x, weight, _, lora_A, lora_B = inputs(dtype=torch.float64)
    if kind == "linear":
        of_library = lora_linear(x, weight, None, lora_A, lora_B, SCALING)
        of_formula = F.linear(x, weight + SCALING * lora_B @ lora_A)
    else:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)
        lora_A = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        lora_B = torch.randn(5, 2, 1, 1, generator=generator, dtype=torch.float64, requires_grad=True)
        geometry = Geometry((1, 1), (1, 1), (1, 1))
        of_library = lora_conv(x, weight, None, lora_A, lora_B, SCALING, geometry)
        product = (lora_B.flatten(1) @ lora_A.flatten(1)).view_as(weight)
        of_formula = F.conv2d(x, weight + SCALING * product, None, 1, 1)
    found = []
    for out in (of_library, of_formula):
        (grad_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad_x.square().sum(), (lora_A, lora_B)))
    torch.testing.assert_close(*found)


def test_no_second_copy_of_a_weight_is_kept_for_the_backward_pass(small_weight):
    x, weight, bias, lora_A, lora_B = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, lora_A, lora_B, SCALING)
    own = {t.data_ptr() for t in (x, weight, lora_A, lora_B)}
    assert kept and (small_weight or {t.untyped_storage().data_ptr() for t in kept} <= own)
