"""The files of diffusers, `pytorch_lora_weights.safetensors`, in its three dialects.

    diffusers             unet.<path>.lora_A.weight                                 PEFT style, of today
    diffusers-sd15        unet.<path>.to_q.lora.down.weight                         what the SD 1.5 scripts write
    diffusers-processors  unet.<path>.attn1.processor.to_q_lora.down.weight         old; read only

No tensor holds an alpha: without a header scaling is 1. The PEFT style carries alphas, rsLoRA and DoRA in the header
(`lora_adapter_metadata`, the fields of peft's LoraConfig for each component) wherever scaling is not 1. Where layers of a
file without alphas have different ranks, diffusers before 0.40 gives most of them a wrong strength.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.component_names import COMPONENTS, component_of, in_components, name_in_component
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats.factors import assemble
from xdiffusion.checkpoints.lora_formats.keys import Loose, named_as_exchanged
from xdiffusion.checkpoints.lora_formats.peft import alpha_from, check_config, config_of, magnitude_of
from xdiffusion.checkpoints.native import reading_header
from xdiffusion.checkpoints.writing import save_safetensors

METADATA = "lora_adapter_metadata"


def read(loose: Loose, metadata: Mapping[str, str], path: Path) -> dict[str, LoRAFactors]:
    """Factors by exchange name; alphas from the header, from `.alpha` tensors, else alpha = rank.

    A file without a header may be of any model, as peft's `get_peft_model_state_dict` gives it: then names are the file's own.
    """
    if METADATA not in metadata and not in_components(loose.parts):
        return assemble(loose.parts, path, loose.repairs)
    parts = named_as_exchanged(loose, path)
    if METADATA not in metadata:
        return assemble(parts, path, loose.repairs)
    with reading_header(path):
        configs = _by_component(json.loads(metadata[METADATA]))
        for config in configs.values():
            check_config(config, path)

        def alpha_of(module: str, rank: int) -> tuple[float, bool]:
            component, _, name = module.partition(".")
            return alpha_from(configs[component], name, rank) if component in configs else (float(rank), False)

        return assemble(parts, path, loose.repairs, alpha_of)


def write_peft_style(lora: LoRAFile, path: Path) -> None:
    """Write the dialect of today; scaling other than 1 goes into the header."""
    tensors: dict[str, Tensor] = {}
    for name, factors in _in_a_component(lora).items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = factors.lora_A, factors.lora_B
        if factors.magnitude is not None:
            # with .weight, unlike in peft's own folders: transformers leaves the other spelling aside, and draws without it
            tensors[f"{name}.lora_magnitude_vector.weight"] = magnitude_of(factors)
    header = {"format": "pt"}
    if any(f.scaling != 1 or f.magnitude is not None for f in lora.modules.values()):
        fields = {}
        for component in COMPONENTS:
            part = {name_in_component(n): f for n, f in lora.modules.items() if component_of(n) == component}
            if part:
                fields |= {f"{component}.{key}": value for key, value in config_of(part).items()}
        header[METADATA] = json.dumps(fields, indent=2, sort_keys=True)
    save_safetensors(path, tensors, {**lora.metadata, **header})


def write_sd15_style(lora: LoRAFile, path: Path) -> None:
    """Write what diffusers' SD 1.5 scripts write, the only dialect of old readers.

    The scripts leave layers outside the attention in the PEFT style, but diffusers goes by the first key of a file: here
    the whole UNet is in one dialect, which every diffusers reads.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in _in_a_component(lora).items():
        layer = "lora_linear_layer" if component_of(name) == "text_encoder" else "lora"
        tensors[f"{name}.{layer}.down.weight"], tensors[f"{name}.{layer}.up.weight"] = factors.lora_A, factors.lora_B
    save_safetensors(path, tensors, {**lora.metadata, "format": "pt"})


def _in_a_component(lora: LoRAFile) -> Mapping[str, LoRAFactors]:
    other = next((name for name in lora.modules if component_of(name) is None), None)
    if other:
        raise CheckpointError(f"diffusers' formats have no place for {other}: they hold a UNet and a text encoder")
    return lora.modules


def _by_component(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return configs
