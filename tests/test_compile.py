"""--compile: with torch's compiled module around the network, the checkpoints of a base and of a LoRA are those without.

The module is told to run what it holds as it stands: to trace a network takes half a minute, to write its code minutes.
"""

import pytest
import torch
from commands import TRAIN, run_script, set_words

from xdiffusion.checkpoints.files import load_safetensors


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
