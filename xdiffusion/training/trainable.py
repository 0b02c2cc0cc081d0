"""Which weights of a model a run trains, and what it tells of them."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.lora.adapters import get_lora_parameters
from xdiffusion.lora.inject import apply_lora_to_model, lora_layers
from xdiffusion.model import DiffusionModel
from xdiffusion.training.textual_inversion import TextualInversionSettings, learn_token

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def make_trainable(model: DiffusionModel, config: DictConfig, *, lora: bool) -> None:
    """Freeze everything but what is trained.

    That is the network; or fresh LoRAs, `lora:` of it and `text_encoder_lora:` of the text encoder; or, where there is a
    section `textual_inversion:`, the learned word instead of the network, or beside the LoRAs (pivotal tuning).

    With `training.half_frozen_weights` the network and the text encoder are rounded first: DoRA's lengths and PiSSA's
    factors are then those of the weights that the run has.

    Raises:
        ValueError: for settings that the model cannot have, or half_frozen_weights where the network is trained.
    """
    model.requires_grad_(False)
    if config.training.half_frozen_weights:
        if not (lora or "textual_inversion" in config):
            raise ValueError(
                "training.half_frozen_weights=true is for runs that train a LoRA or a learned word alone: this one trains "
                "the network, whose weights stay float32"
            )
        for part in (model.network, model.text_encoder):  # the autoencoder's errors would be seen
            part.to(dtype=HALF.get(config.training.mixed_precision))
    if lora:
        for part, section in ((model.network, "lora"), (model.text_encoder, "text_encoder_lora")):
            if section in config:
                given = OmegaConf.to_container(config[section])
                not_its_own = ("training", "optimizer", "cache", "learning_rate")
                apply_lora_to_model(part, **{k: v for k, v in given.items() if k not in not_its_own})
    elif "textual_inversion" not in config:
        model.network.requires_grad_(True)
    if "textual_inversion" in config:
        learn_token(model.text_encoder, TextualInversionSettings(**OmegaConf.to_container(config.textual_inversion)))


def describe_model(model: DiffusionModel, config: DictConfig | None = None) -> str:
    """The config as YAML if given, then parameters by part and trainable ones; a LoRA's share is of its part."""
    lines = [OmegaConf.to_yaml(config)] if config is not None else []
    lines.append(
        f"parameters: network {_count(model.network):,}, text encoder {_count(model.text_encoder):,} (frozen), "
        f"autoencoder {_count(model.autoencoder):,} (frozen)"
    )
    for part, name in ((model.network, "network"), (model.text_encoder, "text encoder")):
        layers, trained = len(lora_layers(part)), sum(p.numel() for p in get_lora_parameters(part))
        if layers:
            lines.append(
                f"LoRA: {trained:,} trainable parameters in {layers} layers, "
                f"{trained / _count(part):.2%} of the {name}'s {_count(part):,}"
            )
    for word, ids in model.text_encoder.learned_ids.items():
        lines.append(f"learned word {word}: {len(ids)} trainable embeddings of {model.text_encoder.width} numbers")
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    """Parameters without those of adapters."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)
