"""--compile: with torch's compiled module around the network, the checkpoints of a base and of a LoRA are those without.

The module is told to run what it holds as it stands: to trace a network takes half a minute, to write its code minutes.
"""

import pytest
import torch
from commands import TRAIN, run_script, set_words
from torch import nn

from xdiffusion.checkpoints.files import load_safetensors
from xdiffusion.lora import apply_lora_to_model, get_lora_parameters


@pytest.fixture
def compiled(monkeypatch):
    """The networks that were compiled."""
    networks = []

    def compile(network):
        networks.append(network)
        return real(network)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    with torch.compiler.set_stance("force_eager"):
        yield networks


@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_run_writes_what_another_does(lora, tiny_run, compiled, tmp_path):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--force_cpu"]
    if lora:
        words += ["--use_lora_training", "--load_model_weights_from_checkpoint", tiny_run.checkpoint]
    written = []
    for flag in ("--no-compile", "--compile"):
        folder = tmp_path / flag
        assert run_script(TRAIN, *words, flag, "--output_path", folder) == 0
        # and goes on from there
        more = ["--num_training_steps", 3, "--resume_from", "auto"]
        assert run_script(TRAIN, *words, flag, *more, "--output_path", folder) == 0
        written.append(load_safetensors(folder / f"diffusion-3{'-lora' if lora else ''}.safetensors")[0])
    assert len(compiled) == 2
    plain, same = written
    assert plain.keys() == same.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_what_follows_a_compiled_lora_layer_is_autocast_too(layer, generator):
    """And every gradient is that of the layers as they stand. Traced, by a backend that writes no code."""
    of = (lambda: nn.Conv2d(6, 6, 3, padding=1)) if layer == "convolution" else (lambda: nn.Linear(6, 6))
    network = nn.Sequential(*(of() for _ in range(3)))
    apply_lora_to_model(network, rank=2, alpha=2.0, target_modules="all")
    for parameter in get_lora_parameters(network):
        nn.init.normal_(parameter, generator=generator)
    x = (
        torch.randn(2, 6, 16, 16, generator=generator)
        if layer == "convolution"
        else torch.randn(900, 6, generator=generator)
    )
    found = {}
    for name, run in (("plain", network), ("compiled", torch.compile(network, backend="aot_eager"))):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        assert out.dtype == torch.bfloat16, name
        out.float().square().mean().backward()
        found[name] = [out.detach(), *(p.grad for p in get_lora_parameters(network))]
        network.zero_grad()
    for plain, compiled in zip(*found.values()):
        torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())
