"""LoRA files: what is saved comes back bit for bit, and what does not fit is refused with the model left alone."""

import copy
import math

import pytest
import torch
from tiny import copies, equal_bits
from torch import nn

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.lora import (
    LoRAError,
    apply_lora_to_model,
    load_lora_weights,
    save_lora_weights,
    set_lora_enabled,
    set_lora_scale,
)
from xdiffusion.lora.inject import lora_layers, lora_layers_at
from xdiffusion.lora.weights import parse_lora_spec


def model():
    """Linear "0", normalisation "1", Conv1d "2" with 12 inputs per output; the same weights on every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Conv1d(4, 5, 3, padding=1))


def adapted(ranks_and_alphas, adapter_name="default", seed=1):
    """A model whose layers (by name) have an adapter of that rank and alpha with random factors."""
    adapted = model()
    generator = torch.Generator().manual_seed(seed)
    for name, (rank, alpha) in ranks_and_alphas.items():
        layer = lora_layers_at(adapted, [name])[name]
        layer.add_adapter(adapter_name, rank, alpha)
        with torch.no_grad():
            layer.lora_A[adapter_name].normal_(generator=generator)
            layer.lora_B[adapter_name].normal_(generator=generator)
    return adapted


def output(network):
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = network[1](network[0](x)).mT.contiguous()  # (3, 4, 2)
        return network[2](hidden)


def factors(network):
    return {n: p for n, p in network.state_dict().items() if ".lora_" in n}


def save_tensors(path, tensors):
    """A native file of any tensors, alpha 2."""
    header = {"format": "xdiffusion-lora", "config": "{}", "step": "0", "lora_alpha": "2.0"}
    save_safetensors(path, tensors, header)


MIXED = {"0": (3, 1.5), "2": (1, 8.0)}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    source, path = adapted(MIXED), tmp_path / "a" / "lora.safetensors"
    save_lora_weights(source, path, base_hash="abc", config={"lora": {"rank": 3}}, step=7)
    target = model()
    load_lora_weights(target, path)
    assert equal_bits(factors(target), factors(source))
    assert torch.equal(output(target), output(source))
    loaded = {name: layer.adapters["default"] for name, layer in lora_layers(target)}
    assert loaded == {name: layer.adapters["default"] for name, layer in lora_layers(source)}
    assert {name: (s.rank, s.lora_alpha) for name, s in loaded.items()} == MIXED
    file = read_lora(path)
    assert {name: f.lora_alpha for name, f in file.modules.items()} == {"0": 1.5, "2": 8.0}
    assert (file.base_hash, file.config, file.step) == ("abc", {"lora": {"rank": 3}}, 7)


def test_a_file_holds_the_factors_and_nothing_else(tmp_path):
    save_lora_weights(adapted(MIXED), tmp_path / "lora.safetensors")
    tensors, _ = load_safetensors(tmp_path / "lora.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "0.lora_A": (3, 6), "0.lora_B": (4, 3), "2.lora_A": (1, 4, 3), "2.lora_B": (5, 1, 1),
    }  # fmt: skip


def test_the_report_counts_and_measures(tmp_path):
    source = adapted(MIXED)
    save_lora_weights(source, tmp_path / "lora.safetensors")
    report = load_lora_weights(model(), tmp_path / "lora.safetensors", scale=0.5)
    assert report.matched == ["0", "2"]
    assert (report.scale, report.scalings) == (0.5, [0.5, 8.0])
    delta = weight = 0.0
    for name, scaling in (("0", 0.5), ("2", 8.0)):
        layer = source[int(name)]
        lora_A, lora_B = (f["default"].detach().double() for f in (layer.lora_A, layer.lora_B))
        delta += float(torch.einsum("or,r...->o...", lora_B.flatten(1), lora_A).mul(scaling).square().sum())
        weight += float(layer.weight.detach().double().square().sum())
    assert report.relative_delta == pytest.approx(math.sqrt(delta / weight), rel=1e-5)
    assert str(report).startswith("2 modules matched, none missing, none unexpected; alpha/rank 0.5, 8, scale 0.5, ")


def test_the_report_names_adapted_layers_that_the_file_has_nothing_for(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora_weights(adapted({"0": MIXED["0"]}), path)
    report = load_lora_weights(apply_lora_to_model(model(), rank=1, target_modules=["0", "2"]), path)
    assert (report.matched, report.missing) == (["0"], ["2"])
    assert str(report).startswith("1 modules matched, 1 missing (such as 2), none unexpected; ")


def test_scale_at_load_is_the_strength_at_run_time(tmp_path):
    source = adapted(MIXED)
    save_lora_weights(source, tmp_path / "lora.safetensors")
    half, none = model(), model()
    load_lora_weights(half, tmp_path / "lora.safetensors", scale=0.5)
    load_lora_weights(none, tmp_path / "lora.safetensors", scale=0.0)
    assert torch.equal(output(none), output(model()))
    set_lora_scale(source, 0.5)
    assert torch.equal(output(half), output(source))
    set_lora_scale(half, 1.0)
    set_lora_scale(source, 1.0)
    assert torch.equal(output(half), output(source))


def test_run_time_settings_are_not_in_the_file(tmp_path):
    source = adapted(MIXED)
    expected = output(source)
    set_lora_scale(source, 3.0)
    set_lora_enabled(source, False)
    save_lora_weights(source, tmp_path / "lora.safetensors")
    target = model()
    load_lora_weights(target, tmp_path / "lora.safetensors")
    assert torch.equal(output(target), expected)


def test_two_adapters_from_two_files(tmp_path):
    style, subject = adapted({"0": (2, 4.0)}), adapted(MIXED, seed=5)
    save_lora_weights(style, tmp_path / "style.safetensors")
    save_lora_weights(subject, tmp_path / "subject.safetensors")
    both = model()
    load_lora_weights(both, tmp_path / "style.safetensors", adapter_name="style", scale=0.7)
    load_lora_weights(both, tmp_path / "subject.safetensors", adapter_name="subject", scale=0.3)
    weight = model()[0].weight + 0.7 * style[0].delta("default") + 0.3 * subject[0].delta("default")
    torch.testing.assert_close(both[0].effective_weight(), weight)
    set_lora_enabled(both, False, "style")
    set_lora_scale(both, 1.0, "subject")
    assert torch.equal(output(both), output(subject))

    save_lora_weights(both, tmp_path / "again.safetensors", adapter_name="style")
    first, again = (load_safetensors(tmp_path / f"{name}.safetensors")[0] for name in ("style", "again"))
    assert equal_bits(again, first)


def test_loading_into_a_wrapped_model(tmp_path):
    save_lora_weights(adapted(MIXED), tmp_path / "lora.safetensors")
    target = model()
    apply_lora_to_model(target, 2, 2.0, 0.0, ["0"], "fresh")
    load_lora_weights(target, tmp_path / "lora.safetensors")
    assert list(target[0].adapters) == ["fresh", "default"]
    torch.testing.assert_close(output(target), output(adapted(MIXED)))  # the fresh one adds nothing yet


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_lower_precision_load_into_float32(dtype, tmp_path):
    tensors = {"0.lora_A": torch.randn(2, 6).to(dtype), "0.lora_B": torch.randn(4, 2).to(dtype)}
    save_tensors(tmp_path / "lora.safetensors", tensors)
    target = model()
    load_lora_weights(target, tmp_path / "lora.safetensors")
    assert equal_bits(factors(target), {f"{n}.default": t.float() for n, t in tensors.items()})


A0, B0 = torch.ones(2, 6), torch.ones(4, 2)
A2, B2 = torch.ones(2, 4, 3), torch.ones(5, 2, 1)
GOOD = {"0.lora_A": A0, "0.lora_B": B0, "2.lora_A": A2, "2.lora_B": B2}


def without(name):
    return {n: t for n, t in GOOD.items() if n != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"unet.{n}": t for n, t in GOOD.items()}, "2 of its 2 modules are not there, such as unet.0"),
        (GOOD | {"3.lora_A": A0.clone(), "3.lora_B": B0.clone()}, "1 of its 3 modules are not there, such as 3"),
        (GOOD | {"1.lora_A": torch.ones(2, 4), "1.lora_B": torch.ones(4, 2)}, "1 of its 3 modules .* such as 1"),
        (without("0.lora_A"), "one factor of 0 is missing"),
        (without("2.lora_B"), "one factor of 2 is missing"),
        (GOOD | {"0.dora_scale": torch.ones(4)}, "'0.dora_scale' is a key of no LoRA format"),
        (GOOD | {"2.lora_A": torch.ones(2, 6, 3)}, r"2 has weight \(5, 4, 3\), the file's factors are A \(2, 6, 3\)"),
        (GOOD | {"2.lora_B": torch.ones(5, 3, 1)}, r"2 have no common rank: A \(2, 4, 3\) and B \(5, 3, 1\)"),
        (GOOD | {"0.lora_B": torch.ones(3, 2)}, r"0 has weight \(4, 6\), .* and B \(3, 2\)"),
        (GOOD | {"0.lora_B": torch.ones(4)}, r"0 are no low-rank pair: A \(2, 6\) and B \(4,\)"),
        (GOOD | {"0.lora_B": torch.tensor(1.0)}, r"and B \(\)"),
        (GOOD | {"0.lora_A": torch.tensor(1.0)}, r"A \(\)"),
        (GOOD | {"2.lora_A": torch.ones(0, 4, 3), "2.lora_B": torch.ones(5, 0, 1)}, "2 have no common rank"),
        (GOOD | {"2.lora_A": torch.ones(13, 4, 3), "2.lora_B": torch.ones(5, 13, 1)}, r"rank=13 must be in 1\.\.12"),
        (GOOD | {"2.lora_A": A2 * math.nan}, "the factors of 2 are not finite"),
        (GOOD | {"0.lora_B": 0 * B0, "2.lora_B": 0 * B2}, "every lora_B is zero"),
        ({}, "holds no factors|InvalidHeader"),  # safetensors 0.4.3 writes no tensors with a comma too much
    ],
)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tensors, message, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_tensors(path, tensors)
    target = model()
    assert_refused(target, path, message)


def assert_refused(target, path, message, **arguments):
    before, kinds = copies(target.state_dict()), [type(layer) for layer in target]
    with pytest.raises((LoRAError, CheckpointError), match=message):
        load_lora_weights(target, path, **arguments)
    assert equal_bits(target.state_dict(), before)
    assert [type(layer) for layer in target] == kinds


def test_a_strength_that_is_no_number_changes_nothing(tmp_path):
    save_lora_weights(adapted(MIXED), tmp_path / "lora.safetensors")
    assert_refused(model(), tmp_path / "lora.safetensors", "LoRA scale=nan must be a finite number", scale=math.nan)


def test_a_name_that_the_model_has_is_refused_before_anything_changes(tmp_path):
    save_lora_weights(adapted(MIXED), tmp_path / "lora.safetensors")
    target = model()
    apply_lora_to_model(target, 1, 1.0, 0.0, ["2"])  # "0" comes first in the file, and is free
    with torch.no_grad():
        target[2].lora_B["default"].fill_(1.0)
    said = r"2 has an adapter named 'default' already: take it away with remove_lora\(model, 'default'\), or choose another"
    assert_refused(target, tmp_path / "lora.safetensors", said)


@pytest.mark.parametrize("rank", [1, 2])
def test_an_adapter_that_has_learned_nothing_takes_a_file_in(rank, tmp_path):
    """As in apply, then load; where the ranks agree an optimizer still knows the factors."""
    saved = adapted(MIXED)
    save_lora_weights(saved, tmp_path / "lora.safetensors")
    target = apply_lora_to_model(model(), rank, 1.0, 0.0, ["2"])
    before = target[2].lora_A["default"]
    load_lora_weights(target, tmp_path / "lora.safetensors")
    assert torch.equal(output(target), output(saved))
    assert (target[2].lora_A["default"] is before) == (rank == 1)


def test_a_name_with_pt_is_written_and_read_as_safetensors(tmp_path):
    written = save_lora_weights(adapted(MIXED), tmp_path / "my_lora_weights.pt")
    assert written == tmp_path / "my_lora_weights.safetensors"
    assert list(tmp_path.iterdir()) == [written]
    target = model()
    load_lora_weights(target, tmp_path / "my_lora_weights.pt")
    assert torch.equal(output(target), output(adapted(MIXED)))


def test_another_base_is_refused_where_both_are_known(tmp_path):
    known, unknown = tmp_path / "known.safetensors", tmp_path / "unknown.safetensors"
    save_lora_weights(adapted(MIXED), known, base_hash="abc")
    save_lora_weights(adapted(MIXED), unknown)
    other = model()
    with torch.no_grad():
        other[0].weight.mul_(1.02)
    for given, what in (({"base_hash": "def"}, "this model is def"), ({}, "with other weights in the layers that it adapts")):
        assert_refused(other, known, f"was trained on another base: it names abc, {what}; --allow_other_base", **given)
    for path, given in ((known, {"base_hash": "abc"}), (known, {"allow_other_base": True}), (unknown, {"base_hash": "def"})):
        assert load_lora_weights(copy.deepcopy(other), path, **given).matched == ["0", "2"]


def test_a_model_with_one_zero_b_is_loaded(tmp_path):
    """Only an update that is zero everywhere is a mistake."""
    save_tensors(tmp_path / "lora.safetensors", GOOD | {"0.lora_B": 0 * B0})
    assert load_lora_weights(model(), tmp_path / "lora.safetensors").matched == ["0", "2"]


def test_factors_of_fewer_dimensions_than_the_weight_are_reshaped(tmp_path):
    flat = {"2.lora_A": torch.randn(2, 12), "2.lora_B": torch.randn(5, 2)}
    save_tensors(tmp_path / "lora.safetensors", flat)
    target = model()
    load_lora_weights(target, tmp_path / "lora.safetensors")
    assert torch.equal(target[2].lora_A["default"], flat["2.lora_A"].view(2, 4, 3))
    save_tensors(tmp_path / "lora.safetensors", {**flat, "2.lora_A": flat["2.lora_A"].view(2, 4, 3)})
    report = load_lora_weights(model(), tmp_path / "lora.safetensors")
    assert "2: factors of different dimensions: A (2, 4, 3) and B (5, 2)" in str(report)


def test_rslora_and_dora_are_saved_and_loaded(tmp_path):
    source = model()
    apply_lora_to_model(source, 4, 2.0, 0.0, "all", use_rslora=True, use_dora=True)
    for _, layer in lora_layers(source):
        with torch.no_grad():
            layer.lora_B["default"].normal_()
            layer.lora_magnitude["default"].add_(0.1)
    save_lora_weights(source, tmp_path / "lora.safetensors")
    target = model()
    assert load_lora_weights(target, tmp_path / "lora.safetensors").scalings == [1.0]
    assert equal_bits(factors(target), factors(source))
    assert torch.equal(output(target), output(source))


def test_saving_an_adapter_that_is_not_there_writes_nothing(tmp_path):
    with pytest.raises(LoRAError, match="no LoRA adapter named 'other' to save"):
        save_lora_weights(adapted(MIXED), tmp_path / "lora.safetensors", adapter_name="other")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_model_file_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_lora_weights(model(), tmp_path / "none.safetensors")
    save_file({"0.weight": torch.ones(4, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a LoRA file that is known here"):
        load_lora_weights(model(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a/b.safetensors", "a/b.safetensors", 1.0),
        ("a/b.safetensors:0.8", "a/b.safetensors", 0.8),
        ("b.pt:-1", "b.pt", -1.0),
        ("b.pt:1e-2", "b.pt", 0.01),
        ("C:lora:0.5", "C:lora", 0.5),
    ],
)
def test_lora_specs(text, path, scale):
    spec_path, spec_scale = parse_lora_spec(text)
    assert (str(spec_path), spec_scale) == (path, scale)


@pytest.mark.parametrize("text", ["b.pt:", "b.pt:strong", "b.pt:nan", "b.pt:inf"])
def test_a_bad_scale_is_named(text):
    with pytest.raises(LoRAError, match=f"'{text}': the scale '{text[5:]}' behind the colon must be a number"):
        parse_lora_spec(text)


def test_a_file_whose_name_ends_like_a_scale(tmp_path):
    path = tmp_path / "lora:2"
    path.touch()
    assert parse_lora_spec(str(path)) == (path, 1.0)
    assert parse_lora_spec(f"{path}:0.5") == (path, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_another_precision_or_beside_others_is_no_other_base(dtype, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora_weights(adapted(MIXED), path, base_hash="abc")
    report = load_lora_weights(model().to(dtype), path, base_hash="def")
    assert str(report).endswith("trained on these weights in another precision, or beside others")
    assert "another precision" not in str(load_lora_weights(model(), path, base_hash="abc"))
