"""LoRAs for Stable Diffusion 1.5's layers, small enough for a test to write in every format."""

from __future__ import annotations

import torch

from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, read_lora, sd_layer_table, write_lora

WRITTEN = [name for name, kind in FORMATS.items() if kind.write]
SD15 = sd_layer_table("sd15")
BLOCK = "unet.down_blocks.0.attentions.0"
ATTENTION = f"{BLOCK}.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0"


def random_factors(name, rank, alpha, table=SD15, dtype=torch.float32, flat=False, **fields):
    """Factors for a layer of a table; `flat`: 2-D whatever the weight is."""
    generator = torch.Generator().manual_seed(len(name) + rank)
    out_size, *inner = table[name]
    lora_A = torch.randn(rank, *inner, generator=generator).to(dtype)
    lora_B = torch.randn(out_size, rank, *[1] * (len(inner) - 1), generator=generator).to(dtype)
    if flat:
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    return LoRAFactors(lora_A, lora_B, alpha, **fields)


def mixed(dtype=torch.float32, flat=False):
    """Attention, feed-forward, 1x1 and 3x3 convolutions, text encoder; three ranks, alphas off the ranks, one rsLoRA."""
    modules = {
        f"{ATTENTION}.to_q": random_factors(f"{ATTENTION}.to_q", 4, 1.0, dtype=dtype),
        f"{ATTENTION}.to_out.0": random_factors(f"{ATTENTION}.to_out.0", 3, 0.7, dtype=dtype, use_rslora=True),
        f"{BLOCK}.transformer_blocks.0.ff.net.0.proj": random_factors(
            f"{BLOCK}.transformer_blocks.0.ff.net.0.proj", 2, 8.0, dtype=dtype
        ),
        f"{BLOCK}.proj_in": random_factors(f"{BLOCK}.proj_in", 4, 4.0, dtype=dtype, flat=flat),
        "unet.down_blocks.0.resnets.0.conv1": random_factors("unet.down_blocks.0.resnets.0.conv1", 2, 3.0, dtype=dtype),
        f"{TEXT}.self_attn.q_proj": random_factors(f"{TEXT}.self_attn.q_proj", 4, 0.3, dtype=dtype),
        f"{TEXT}.mlp.fc1": random_factors(f"{TEXT}.mlp.fc1", 1, 5.0, dtype=dtype),
    }
    return LoRAFile(modules, tokens={"<s1>": torch.randn(768)})


def path_of(format, folder, name="lora"):
    return folder / f"{name}-{format}{FORMATS[format].suffix}"


def converted(lora, format, folder, **arguments):
    path = path_of(format, folder)
    write_lora(lora, path, format, **arguments)
    return read_lora(path, arguments.get("names"))


def applied(lora_A, lora_B, scaling=1.0) -> torch.Tensor:
    """scaling * B A on 16 fixed random inputs, float64: equal for equal updates alone, and far smaller than B A."""
    lora_A, lora_B = lora_A.double().flatten(1), lora_B.double().flatten(1)
    inputs = torch.randn(lora_A.shape[1], 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scaling * lora_B @ (lora_A @ inputs)


def assert_equal_products(actual, expected, tolerance=1e-6):
    assert actual.modules.keys() == expected.modules.keys()
    for name, factors in expected.modules.items():
        delta, other = (applied(f.lora_A, f.lora_B, f.scaling) for f in (factors, actual.modules[name]))
        error = (other - delta).norm() / delta.norm()
        assert error < tolerance, (name, float(error))
