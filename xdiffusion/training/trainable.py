"""Which weights of a model a run trains, and what it tells of them."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.lora.adapters import get_lora_parameters
from xdiffusion.lora.inject import apply_lora_to_model, lora_layers, target_names
from xdiffusion.model import HALF, DiffusionModel
from xdiffusion.training.settings import settings_of
from xdiffusion.training.textual_inversion import learn_token

MANY = 300_000_000  # trained weights of which a hint says what they take


def make_trainable(model: DiffusionModel, config: DictConfig, *, lora: bool) -> None:
    """Freeze everything but what is trained.

    That is the network; or fresh LoRAs, `lora:` of it and `text_encoder_lora:` of the text encoder; or, where there is a
    section `textual_inversion:`, the learned word instead of the network, or beside the LoRAs (pivotal tuning). The text
    encoder's projection, on which no picture depends, never has a LoRA.

    With `training.half_frozen_weights` the network and the text encoder are rounded first: DoRA's lengths and PiSSA's
    factors are then those of the weights that the run has.

    Raises:
        ValueError: for settings that the model cannot have, a LoRA of that projection alone, or half_frozen_weights where the
            network is trained.
    """
    model.requires_grad_(False)
    if config.training.half_frozen_weights:
        if not (lora or "textual_inversion" in config):
            raise ValueError(
                "training.half_frozen_weights=true is for runs that train a LoRA or a learned word alone: this one trains "
                "the network, whose weights stay float32"
            )
        model.set_precision(HALF.get(config.training.mixed_precision))
    if lora:
        for part, section in ((model.network, "lora"), (model.text_encoder, "text_encoder_lora")):
            if section in config:
                given = OmegaConf.to_container(config[section])
                not_its_own = ("training", "optimizer", "cache", "learning_rate")
                targets = [n for n in target_names(part, given["target_modules"]) if n != "text_projection"]
                if not targets:
                    said = f"{section}.target_modules={given['target_modules']!r}"
                    raise ValueError(f"{said} names the text projection alone, on which no picture depends")
                given["target_modules"] = targets
                apply_lora_to_model(part, **{k: v for k, v in given.items() if k not in not_its_own})
    elif "textual_inversion" not in config:
        model.network.requires_grad_(True)
    if "textual_inversion" in config:
        learn_token(model.text_encoder, settings_of(config, "textual_inversion"))


def describe_model(model: DiffusionModel, config: DictConfig | None = None) -> str:
    """The config as YAML if given, then parameters by part and trainable ones; a LoRA's share is of its part.

    A part is frozen where nothing of its own is trained, whatever is added to it.
    """
    lines = [OmegaConf.to_yaml(config)] if config is not None else []
    parts = {"network": model.network, "text encoder": model.text_encoder, "autoencoder": model.autoencoder}
    own = {name: _own_parameters(part) for name, part in parts.items()}
    frozen = {name: not any(p.requires_grad for p in parameters) for name, parameters in own.items()}
    counts = (f"{name} {_count(parts[name]):,}{' (frozen)' * frozen[name]}" for name in parts)
    lines.append(f"parameters: {', '.join(counts)}")
    trained = sum(_count(part) for name, part in parts.items() if not frozen[name])
    if trained > MANY:
        lines.append(
            f"hint: this run trains all {trained / 1e6:,.0f} M of them: weights, gradients and AdamW's moments take "
            f"{16 * trained / 1e9:.0f} GB in float32, activations not counted; --use_lora_training trains a small part"
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


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters without those of adapters and learned words."""
    added = (".lora_", "learned_embedding")
    return [p for name, p in module.named_parameters() if not any(word in name for word in added)]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in _own_parameters(module))
