"""Low-rank adaptation of any `nn.Module` ([LoRA], arXiv 2106.09685): wrap, train, save, load, scale, merge."""

from xdiffusion.lora.adapters import (
    get_lora_parameters,
    lora_disabled,
    remove_lora,
    set_lora_enabled,
    set_lora_scale,
    swap_lora,
)
from xdiffusion.lora.fold import fold_lora_weights, merge_lora_weights, unmerge_lora_weights
from xdiffusion.lora.inject import apply_lora_to_model
from xdiffusion.lora.layers import LoRAConv1d, LoRAConv2d, LoRALinear
from xdiffusion.lora.settings import AdapterSettings, LoRAError
from xdiffusion.lora.weights import load_lora_weights, save_lora_weights

__all__ = [
    "AdapterSettings",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAError",
    "LoRALinear",
    "apply_lora_to_model",
    "fold_lora_weights",
    "get_lora_parameters",
    "load_lora_weights",
    "lora_disabled",
    "merge_lora_weights",
    "remove_lora",
    "save_lora_weights",
    "set_lora_enabled",
    "set_lora_scale",
    "swap_lora",
    "unmerge_lora_weights",
]
