"""Packed weights: the same numbers in the same shapes and layouts, updated together."""

import pytest
import torch
from tiny import copies, equal_bits
from torch import nn

from xdiffusion.training.packed_weights import PackedWeights


def some_parameters() -> dict[str, nn.Parameter]:
    """Of odd sizes; one in channels_last memory, one that is a number, one large."""
    torch.manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 5)),
        "convolution": nn.Parameter(torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)),
        "number": nn.Parameter(torch.randn(())),
        "vector": nn.Parameter(torch.randn(17)),
        "large": nn.Parameter(torch.randn(1000)),
        "other rate": nn.Parameter(torch.randn(7)),
    }


def packed_by_rate(parameters, largest=500):
    *group, other = parameters.values()
    return PackedWeights({1.0: group, 4.0: [other]}, largest)


def train(parameters, packed, optimizer, steps, first=1):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad += torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        packed.zero_grad()


def assert_alike(actual, expected):
    """To the bit, but for the last values of an odd size, which AdamW takes one by one and rounds in its own way."""
    assert torch.equal(actual["convolution"], expected["convolution"])
    for name, parameter in expected.items():
        assert torch.allclose(actual[name], parameter, rtol=1e-6, atol=1e-6), name


def adamw(packed):
    return torch.optim.AdamW([{"params": g, "lr": 0.1 * rate} for rate, g in packed.groups.items()], fused=True)


def test_values_shapes_and_layouts_stay_and_small_ones_share_a_buffer():
    plain, parameters = some_parameters(), some_parameters()
    packed = packed_by_rate(parameters)
    assert equal_bits(copies(parameters), copies(plain))
    for name, parameter in parameters.items():
        assert (parameter.stride(), parameter.grad is None) == (plain[name].stride(), name == "large"), name
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride(), name
    buffer, large = packed.groups[1.0]
    assert large is parameters["large"] and len(packed.groups[4.0]) == 1
    assert packed.updated == [buffer, large, *packed.groups[4.0]]
    places = {p.untyped_storage().data_ptr() for name, p in parameters.items() if name not in ("large", "other rate")}
    assert places == {buffer.untyped_storage().data_ptr()}
    assert all(p.data_ptr() % 64 == buffer.data_ptr() % 64 for p in (parameters["vector"], parameters["number"]))


def test_what_is_done_to_the_buffer_is_done_to_all_in_it():
    """AdamW gives what it gives tensor by tensor; a gradient lands where AdamW reads it."""
    plain, parameters = some_parameters(), some_parameters()
    packed, alone = packed_by_rate(parameters), packed_by_rate(plain, largest=0)
    assert alone.updated == list(plain.values())
    train(parameters, packed, adamw(packed), 5)
    train(plain, alone, adamw(alone), 5)
    assert_alike(parameters, plain)
    averages = [p.detach() + 1 for p in packed.updated]
    for parameter, part in zip(packed.parameters, packed.parts(averages)):
        assert torch.equal(part, parameter + 1) and part.stride() == parameter.stride()


def test_gradients_of_a_backward_pass_add_up_in_the_buffer_and_are_forgotten():
    parameters = some_parameters()
    packed = packed_by_rate(parameters)
    for _ in range(2):
        sum(p.sum() for p in parameters.values()).backward()
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in parameters.values())
    assert packed.groups[1.0][0].grad.sum() == 2 * sum(p.numel() for p in packed.parameters[:4])
    packed.zero_grad()
    assert parameters["large"].grad is None
    assert not any(p.grad.any() for name, p in parameters.items() if name != "large")


@pytest.mark.parametrize("largest", [(500, 0), (0, 500)])
def test_a_saved_state_is_that_of_the_parameters_however_they_are_packed(largest):
    """A run goes on bit for bit, and the file does not know of buffers."""
    whole, first, second = some_parameters(), some_parameters(), some_parameters()
    reference = packed_by_rate(whole, 0)
    train(whole, reference, adamw(reference), 6)

    packed = packed_by_rate(first, largest[0])
    optimizer = adamw(packed)
    train(first, packed, optimizer, 3)
    state = packed.unpacked_state(optimizer.state_dict())
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3, 4], [5]]
    assert [state["state"][i]["exp_avg"].shape for i in range(6)] == [p.shape for p in packed.parameters]

    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    packed = packed_by_rate(second, largest[1])
    optimizer = adamw(packed)
    for moments in state["state"].values():
        moments["step"] = moments["step"].clone()
    optimizer.load_state_dict(packed.packed_state(state))
    train(second, packed, optimizer, 3, first=4)
    assert_alike(second, whole)


def test_other_precisions_are_not_packed():
    half, whole = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
    packed = PackedWeights({1.0: [half, whole]})
    assert [p is half for p in packed.updated] == [False, True] and whole.grad is not None and half.grad is None
