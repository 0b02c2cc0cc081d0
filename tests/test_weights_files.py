"""What an adapter's run writes for others: the adapter alone, as exact as it is asked for."""

import pytest
import torch
from test_state import BASE_HASH, fresh, train
from tiny import equal_bits, tiny_config, tiny_model

from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.lora import load_lora_weights
from xdiffusion.lora.inject import lora_layers
from xdiffusion.training.state import state_path


def test_a_lora_run_writes_the_lora_alone(tmp_path):
    trainer, files = fresh(tmp_path, ["lora.rank=1"], lora=True)
    train(trainer, files)
    names = {f"diffusion-{step}-lora.{kind}" for step in (2, 4, 5) for kind in ("safetensors", "state.pt")}
    assert {path.name for path in tmp_path.iterdir()} == names
    path = tmp_path / "diffusion-5-lora.safetensors"
    tensors, header = load_safetensors(path)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in trainer.trainable.values())
    assert header["base_hash"] == BASE_HASH
    state = load_pickled(state_path(path))
    assert state["trained"].keys() == trainer.trainable.keys()
    largest = max(p.numel() for p in trainer.model.text_encoder.parameters())
    assert state_path(path).stat().st_size < largest  # bytes: no frozen weight is in it

    report = load_lora_weights(tiny_model(tiny_config()), path)
    assert len(report.matched) == len(tensors) // 2
    assert report.scalings == [4.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_lora_file_in_half_precision_is_the_average_rounded_and_its_state_holds_the_whole(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    trainer, files = fresh(tmp_path, [f"checkpoints.lora_dtype={name}"], lora=True)
    train(trainer, files)
    average = trainer.by_name(trainer.ema.average)
    tensors, _ = load_safetensors(files.path(5))
    assert equal_bits(tensors, {n.removesuffix(".default"): a.to(dtype) for n, a in average.items()})
    assert any(not torch.equal(a, a.to(dtype).float()) for a in average.values())
    assert equal_bits(load_pickled(state_path(files.path(5)))["average"], average)
    assert all(p.dtype == torch.float32 for p in trainer.trainable.values())
    model = tiny_model(tiny_config())
    load_lora_weights(model, files.path(5))
    loaded = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert loaded and all(p.dtype == torch.float32 for p in loaded.values())


def test_what_half_precision_cannot_hold_is_written_in_float32_with_a_line(tmp_path, capsys):
    trainer, files = fresh(tmp_path, ["checkpoints.lora_dtype=float16"], lora=True)
    name, parameter = next(iter(trainer.trainable.items()))
    parameter.data.fill_(1e5)
    files.save(trainer, 1)
    files.finish()
    said = f"diffusion-1-lora.safetensors is written in float32: a factor of {name.split('.lora_')[0]} overflows in float16"
    assert capsys.readouterr().err == f"{said}\n"
    tensors, _ = load_safetensors(files.path(1))
    assert equal_bits(tensors, {n.removesuffix(".default"): p.data for n, p in trainer.trainable.items()})


def test_pissas_update_survives_its_file(tmp_path, capsys):
    """Early on it is the small difference of two large products: each of them rounded, it would be another one."""
    overrides = ["checkpoints.lora_dtype=bfloat16", "lora.init=pissa", "optimizer.learning_rate=1e-4"]
    trainer, files = fresh(tmp_path, overrides, lora=True)
    train(trainer, files)
    assert "would be off by " in capsys.readouterr().err
    model = tiny_model(tiny_config())
    load_lora_weights(model, files.path(5))
    with trainer.ema.in_place():
        for name, layer in lora_layers(trainer.model):
            trained, loaded = layer.delta("default"), model.get_submodule(name).delta("default")
            assert (loaded - trained).norm() <= 1e-3 * trained.norm(), name
