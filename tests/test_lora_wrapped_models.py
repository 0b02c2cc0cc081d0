"""LoRA files of models inside torch.compile, DataParallel and DistributedDataParallel have the model's own names."""

import pytest
import torch
from lora_layers import fill_b
from sd_files import sd_config
from torch import nn

from xdiffusion.build import build_model
from xdiffusion.checkpoints.lora_formats import LayerTable, read_lora, write_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.lora import (
    LoRAError,
    LoRALinear,
    apply_lora_to_model,
    load_lora_weights,
    save_lora_weights,
)


def small_model():
    """With a submodule that is named as DataParallel's is."""
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(4, 4), "to_q": nn.Linear(4, 4)}), "b": nn.Linear(4, 3)})


def compiled_part(model):
    model["a"] = torch.compile(model["a"])
    return model


def parallel_part(model):
    model["a"] = nn.DataParallel(model["a"])
    return model


WRAPPED = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled part": compiled_part,
    "parallel part": parallel_part,
    "unwrapped": lambda model: model,
}
each_wrapping = pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
NAMES = {"a.module", "a.to_q", "b"}


def adapted(wrapped):
    """The model wrapped, with filled adapters."""
    model = apply_lora_to_model(wrapped(small_model()), 2, target_modules="all")
    fill_b(model)
    return model


@each_wrapping
def test_a_file_of_a_wrapped_model_fits_any_other(wrapped, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora_weights(adapted(wrapped), path, base_hash="abc")
    assert read_lora(path).modules.keys() == read_lora(path).base_sample.keys() == NAMES
    for other in WRAPPED.values():
        target = other(small_model())
        assert len(load_lora_weights(target, path, base_hash="def").matched) == 3  # the sample knows the base
        expected, actual = (tensors_of(model, tmp_path / "a.safetensors") for model in (adapted(wrapped), target))
        assert expected.keys() == actual.keys() and all(torch.equal(expected[n], actual[n]) for n in expected)


def tensors_of(model, path):
    save_lora_weights(model, path)
    return load_safetensors(path)[0]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_files_that_hold_such_names_are_read(prefix, tmp_path):
    tensors = tensors_of(adapted(WRAPPED["unwrapped"]), tmp_path / "plain.safetensors")
    header = {"format": "xdiffusion-lora", "config": "{}", "step": "0", "lora_alpha": "1.0"}
    save_safetensors(tmp_path / "lora.safetensors", {f"{prefix}{n}": t for n, t in tensors.items()}, header)
    for wrapped in WRAPPED.values():
        assert len(load_lora_weights(wrapped(small_model()), tmp_path / "lora.safetensors").matched) == 3


def test_a_compiled_part_of_stable_diffusion_takes_files_of_other_tools(tmp_path):
    plain = build_model(sd_config("sd15_tiny"))
    apply_lora_to_model(plain.network, 2, target_modules="attention")
    fill_b(plain)
    save_lora_weights(plain, tmp_path / "lora.safetensors")
    write_lora(read_lora(tmp_path / "lora.safetensors"), tmp_path / "kohya.safetensors", "kohya", LayerTable.of(plain))
    model = build_model(sd_config("sd15_tiny"))
    model.network = torch.compile(model.network)
    report = load_lora_weights(model, tmp_path / "kohya.safetensors")
    assert len(report.matched) == len(read_lora(tmp_path / "lora.safetensors").modules)


@pytest.mark.parametrize("wrapped", [lambda layer: layer, torch.compile, nn.DataParallel])
def test_a_layer_without_a_name_cannot_be_saved(wrapped, tmp_path):
    with pytest.raises(LoRAError, match="the LoRALinear itself was given: a file knows layers by their names in a model"):
        save_lora_weights(wrapped(LoRALinear(4, 4)), tmp_path / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []
    model = nn.ModuleDict({"layer": LoRALinear(4, 4)})
    fill_b(model)
    save_lora_weights(model, tmp_path / "lora.safetensors")
    assert list(read_lora(tmp_path / "lora.safetensors").modules) == ["layer"]


def test_a_lazy_layer_in_a_model_stands_in_the_way_of_its_own_factors_alone(tmp_path):
    save_lora_weights(adapted(WRAPPED["unwrapped"]), tmp_path / "lora.safetensors")
    model = small_model()
    model["b"] = nn.LazyLinear(3)
    with pytest.raises(LoRAError, match="b has no weight yet"):
        load_lora_weights(model, tmp_path / "lora.safetensors")
    model = small_model()
    model["c"] = nn.LazyLinear(3)
    assert len(load_lora_weights(model, tmp_path / "lora.safetensors").matched) == 3
