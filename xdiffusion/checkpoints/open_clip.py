"""The names of CLIP's text transformer in open_clip's files, and in ours. Pure dict -> dict, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PLAIN = {
    "token_embedding.weight": "token_embedding.weight",
    "positional_embedding": "positional_embedding",
    "ln_final.weight": "final_norm.weight",
    "ln_final.bias": "final_norm.bias",
}
_IN_LAYER = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.out_proj": "attn.to_out",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("to_q", "to_k", "to_v")


def text_encoder_from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text weights (a whole CLIP's state dict, or its text tower's) under the names of `CLIPTextEncoder`.

    Raises:
        ValueError: for a layer that it does not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text.")
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)(?:[._](weight|bias))", name)
        if name in _PLAIN:
            ours[_PLAIN[name]] = tensor
        elif name == "text_projection":
            ours["text_projection.weight"] = tensor.T  # stored as (width, embed_dim)
        elif layer and layer[2] == "attn.in_proj":
            for projection, part in zip(_QKV, tensor.chunk(3)):
                ours[f"layers.{layer[1]}.attn.{projection}.{layer[3]}"] = part
        elif layer and layer[2] not in _IN_LAYER:
            raise ValueError(f"{name} is of no layer of CLIP's text transformer that is known here")
        elif layer:
            ours[f"layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"] = tensor
    return ours


def text_encoder_to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `text_encoder_from_open_clip`, with the names of a CLIP whose text tower is at the top."""
    plain = {ours: theirs for theirs, ours in _PLAIN.items()}
    in_layer = {ours: theirs for theirs, ours in _IN_LAYER.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in plain:
            theirs[plain[name]] = tensor
        elif name == "text_projection.weight":
            theirs["text_projection"] = tensor.T
        elif layer[2] == "attn.to_q":
            prefix = f"layers.{layer[1]}.attn."
            parts = [tensors[f"{prefix}{projection}.{layer[3]}"] for projection in _QKV]
            theirs[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(parts)
        elif layer[2] not in ("attn.to_k", "attn.to_v"):
            theirs[f"transformer.resblocks.{layer[1]}.{in_layer[layer[2]]}.{layer[3]}"] = tensor
    return theirs
