"""One spelling for the layers of a latent diffusion model, whoever names them: the one of the exchange formats.

    unet.<path in diffusers>, text_encoder.text_model.encoder.layers.<i>.<path in transformers>

A LoRA file and a model meet in this spelling, so a file finds its layers in our model (`network.`, `text_encoder.layers.`),
in diffusers' pipeline parts, and in a UNet or a text encoder alone. Names of any other model stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from xdiffusion.checkpoints.diffusers import unet_name_from_diffusers, unet_name_to_diffusers

COMPONENTS = ("unet", "text_encoder")
COMPILED = "_orig_mod"  # the name of a module in its torch.compile
_IN_UNET = re.compile(
    r"(?:network\.|unet\.)(.+)|((?:conv_in|conv_out|time_embedding|down_blocks|mid_block|up_blocks)(?:\..+)?)"
)
_IN_TEXT_LAYER = re.compile(r"(?:text_encoder\.)?(?:text_model\.)?(?:encoder\.)?layers\.(\d+)\.(.+)")
_TEXT_LAYER = {  # ours, and the oldest diffusers scripts' -> transformers
    "attn.to_q": "self_attn.q_proj",
    "attn.to_k": "self_attn.k_proj",
    "attn.to_v": "self_attn.v_proj",
    "attn.to_out": "self_attn.out_proj",
    "self_attn.to_q": "self_attn.q_proj",
    "self_attn.to_k": "self_attn.k_proj",
    "self_attn.to_v": "self_attn.v_proj",
    "self_attn.to_out.0": "self_attn.out_proj",
}
_TRANSFORMERS = {*_TEXT_LAYER.values(), "mlp.fc1", "mlp.fc2"}
_TEXT_LAYER |= {theirs: theirs for theirs in _TRANSFORMERS}
_SECOND_TEXT_ENCODER = "text_encoder_2."  # of Stable Diffusion XL, in the files of diffusers


def exchange_name(name: str) -> str:
    """network.mid_block.attentions.0.transformer_blocks.0.attn1.to_out -> unet.mid_block....attn1.to_out.0; idempotent."""
    if layer := _IN_TEXT_LAYER.fullmatch(name):
        spelling = _TEXT_LAYER.get(layer[2])
        return f"text_encoder.text_model.encoder.layers.{layer[1]}.{spelling}" if spelling else name
    if part := _IN_UNET.fullmatch(name):
        ours = unet_name_from_diffusers(f"{part[1] or part[2]}.")  # the tables' pairs end in a dot
        return f"unet.{unet_name_to_diffusers(ours)[:-1]}"
    return name


def in_components(names: Iterable[str]) -> bool:
    """Whether all modules, in any spelling, have a name that a UNet or a text encoder could have."""
    return all(component_of(exchange_name(name)) or name.startswith(_SECOND_TEXT_ENCODER) for name in names)


def of_pipeline(names: Iterable[str]) -> bool:
    """Whether the modules of a LoRA are Stable Diffusion's: `in_components`, and one at least can be no other model's.

    Layers of many transformers are named as CLIP's, Llama's `layers.0.self_attn.q_proj` too. Where all are so, without
    `text_encoder.` in front, they may be any model's.
    """
    names = list(names)
    return in_components(names) and not all(_is_any_transformer_s(name) for name in names)


def _is_any_transformer_s(name: str) -> bool:
    layer = _IN_TEXT_LAYER.fullmatch(name)
    return layer is not None and layer[2] in _TRANSFORMERS and not name.startswith("text_encoder.")


def name_in_component(name: str) -> str:
    """An exchange name without its component, as the modules of the installed libraries are named there.

    transformers dropped `text_model.` in version 5; as an ending, the rest is a name of version 4 too.
    """
    component = component_of(name)
    return name.removeprefix(f"{component}.").removeprefix("text_model.") if component else name


def component_of(name: str) -> str | None:
    """ "unet" or "text_encoder" of an exchange name; None for the layer of another model."""
    component = name.partition(".")[0]
    return component if component in COMPONENTS else None


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name without what torch.compile, DataParallel and DistributedDataParallel put into it."""
    parts, parent = [], model
    for part in filter(None, name.split(".")):
        parallel = isinstance(parent, nn.DataParallel | nn.parallel.DistributedDataParallel)
        if part != COMPILED and not (part == "module" and parallel):
            parts.append(part)
        parent = parent._modules[part]
    return ".".join(parts)
