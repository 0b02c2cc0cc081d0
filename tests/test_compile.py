"""--compile: with torch's compiled module around the network, the checkpoints of a base and of a LoRA are those without.

The module is told to run what it holds as it stands: to trace a network takes half a minute, to write its code minutes.
"""

import subprocess
import sys

import pytest
import torch
from commands import TRAIN, run_script, set_words

from xdiffusion.checkpoints.reading import load_safetensors


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


LORA_BLOCK = """
import torch
from torch import nn
from xdiffusion.layers.resnet import ResBlock
from xdiffusion.lora import apply_lora_to_model, get_lora_parameters

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.resnet = ResBlock(8, 8, time_dim=32, time_conditioning="add", norm_groups=4)

    def forward(self, x, time):
        return self.resnet(self.conv_in(x), time)

torch.manual_seed(0)
network = Block()
apply_lora_to_model(network, rank=4, alpha=4.0, target_modules="all")
for parameter in get_lora_parameters(network):
    nn.init.normal_(parameter, std=0.1)
x, time, found = torch.randn(4, 4, 8, 8), torch.randn(4, 32), []
for run in (torch.compile(network, backend="aot_eager", fullgraph=True), network):
    with torch.autocast("cpu", torch.bfloat16):
        out = run(x, time)
    out.float().square().mean().backward()
    found.append([out.detach(), *(p.grad.clone() for p in get_lora_parameters(network))])
    network.zero_grad()
for compiled, plain in zip(*found):
    torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())
"""


def test_what_follows_a_compiled_lora_layer_is_autocast_too():
    """And every gradient is that of the layers as they stand. Traced, by a backend that writes no code, in a process without
    the checks of shapes that these tests put around functions, which would cut the graph."""
    done = subprocess.run([sys.executable, "-c", LORA_BLOCK], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
