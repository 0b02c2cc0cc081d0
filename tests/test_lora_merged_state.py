"""A merged model that is cast, moved, copied, pickled or given other weights, and then unmerged."""

import copy
import io

import pytest
import torch
from lora_layers import fill_b
from torch import nn

from xdiffusion.lora import (
    LoRAError,
    apply_lora_to_model,
    fold_lora_weights,
    load_lora_weights,
    lora_disabled,
    merge_lora_weights,
    save_lora_weights,
    set_lora_enabled,
    set_lora_scale,
    unmerge_lora_weights,
)


def adapted(dtype=torch.float32):
    """A model with the adapters "a" on both layers and "b" on the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    apply_lora_to_model(model, 2, 3.0, target_modules="all", adapter_name="a")
    apply_lora_to_model(model, 2, 3.0, target_modules=["0"], adapter_name="b")
    fill_b(model)
    return model


def sample(dtype=torch.float32):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    same = [torch.equal(a[n], b[n]) and (a[n].dtype, a[n].device) == (b[n].dtype, b[n].device) for n in a]
    return a.keys() == b.keys() and all(same)


each_merge = pytest.mark.parametrize("merged", [None, "a", "b"], ids=["all", "a", "b"])


# cast and moved


@each_merge
@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_unmerged_it_is_what_it_would_be_without_the_merge(base, cast, merged):
    model, expected = adapted(base), adapted(base)
    merge_lora_weights(model, merged)
    model.to(cast)
    unmerge_lora_weights(model)
    if base is not cast:  # where the base has that dtype already, only the factors that are still apart are cast
        assert states_equal(model, expected.to(cast))
        assert torch.equal(model(sample(cast)), expected(sample(cast)))
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {cast}


def test_a_merge_and_back_leaves_the_factors_in_float32():
    model, expected = adapted(torch.bfloat16), adapted(torch.bfloat16)
    merge_lora_weights(model)
    unmerge_lora_weights(model)
    assert states_equal(model, expected)
    assert model[0].lora_A["a"].dtype == torch.float32


def test_a_merged_weight_is_a_copy_also_where_nothing_is_merged_into_it():
    """Of adapters that are off, or at a scale of 0: whatever is done to it, the base comes back."""
    model, expected = adapted(), adapted()
    set_lora_enabled(model, False)
    merge_lora_weights(model)
    model[0].weight.zero_()
    unmerge_lora_weights(model)
    assert states_equal(model, expected)


def test_it_follows_to_another_device():
    model = adapted()
    merge_lora_weights(model)
    model.to("meta")
    unmerge_lora_weights(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_one_of_two_unmerged_and_a_fold_follow_too():
    model, expected = adapted(), adapted().double()
    merge_lora_weights(model)
    model.double()
    unmerge_lora_weights(model, "b")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    set_lora_scale(model, 0.5, "b")
    set_lora_scale(expected, 0.5, "b")
    torch.testing.assert_close(model(sample(torch.float64)), expected(sample(torch.float64)))
    fold_lora_weights(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(sample(torch.float64)), expected(sample(torch.float64)))


def test_a_folded_layer_is_in_the_mode_the_model_is_in():
    model = adapted().train()
    merge_lora_weights(model)
    fold_lora_weights(model.eval())
    assert not any(module.training for module in model.modules())


# other weights


@each_merge
@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_are_refused_while_merged(assign, merged):
    model = adapted()
    merge_lora_weights(model, merged)
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    before = copy.deepcopy(model)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(LoRAError, match="0 is merged: call unmerge_lora_weights, or fold_lora_weights, before load_state"):
            each.load_state_dict(other, assign=assign)
        assert states_equal(each, before)


def test_weights_load_again_after_unmerging_or_folding():
    for ending in (unmerge_lora_weights, fold_lora_weights):
        model = adapted()
        merge_lora_weights(model)
        ending(model)
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
        assert not model[0].weight.any() and not model[0].bias.any()
    assert not model[0]._load_state_dict_pre_hooks
    merged = adapted()
    merge_lora_weights(merged)
    adapted().load_state_dict(adapted().state_dict())  # another model's are free


# copies


@each_merge
def test_a_copy_of_a_merged_model_unmerges_on_its_own(merged):
    model, expected = adapted(), adapted()
    merge_lora_weights(model, merged)
    copied = copy.deepcopy(model)
    unmerge_lora_weights(copied)
    assert states_equal(copied, expected)
    with pytest.raises(LoRAError, match="is merged"):
        model.load_state_dict(model.state_dict())


@each_merge
def test_a_merged_model_survives_a_pickle(merged):
    model, expected = adapted(), adapted()
    merge_lora_weights(model, merged)
    read = pickled(model)
    assert states_equal(read, model)
    unmerge_lora_weights(read)
    assert states_equal(read, expected)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_would_pass_a_merged_adapter_by_is_refused(tmp_path):
    """Saving would lose it, switching off would leave it on, and unmerging would take a load back."""
    model = adapted()
    save_lora_weights(model, tmp_path / "b.safetensors", adapter_name="b")
    merge_lora_weights(model, "a")
    with pytest.raises(LoRAError, match="0 is merged: call unmerge_lora_weights before saving"):
        save_lora_weights(model, tmp_path / "a.safetensors", adapter_name="a")
    save_lora_weights(model, tmp_path / "again.safetensors", adapter_name="b")
    set_lora_scale(model, 0.5, "b")
    for doing in (lambda: set_lora_scale(model, 0.0), lambda: lora_disabled(model).__enter__()):
        with pytest.raises(LoRAError, match="0 is merged: call unmerge_lora_weights before"):
            doing()
    for name in ("b", "c"):
        with pytest.raises(LoRAError, match="0 is merged: call unmerge_lora_weights before loading a LoRA"):
            load_lora_weights(model, tmp_path / "b.safetensors", adapter_name=name)
