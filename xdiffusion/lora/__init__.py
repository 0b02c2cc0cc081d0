"""Low-rank adaptation of any `nn.Module` ([LoRA], arXiv 2106.09685): wrap, train, save, load, scale, merge."""

from xdiffusion.lora.inject import (
    apply_lora_to_model,
    get_lora_parameters,
    merge_lora_weights,
    set_lora_enabled,
    set_lora_scale,
    unmerge_lora_weights,
)
from xdiffusion.lora.layers import LoRAConv1d, LoRAConv2d, LoRAError, LoRALinear
from xdiffusion.lora.weights import load_lora_weights, save_lora_weights

__all__ = [
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAError",
    "LoRALinear",
    "apply_lora_to_model",
    "get_lora_parameters",
    "load_lora_weights",
    "merge_lora_weights",
    "save_lora_weights",
    "set_lora_enabled",
    "set_lora_scale",
    "unmerge_lora_weights",
]
