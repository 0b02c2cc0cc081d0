"""Setting up a run: its folder, which weights it trains, and what it tells of itself."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.checkpoints.files import ensure_writable, write_atomically
from xdiffusion.lora.adapters import get_lora_parameters
from xdiffusion.lora.inject import apply_lora_to_model, lora_layers
from xdiffusion.model import DiffusionModel

OUTPUT_ROOT = Path("output")


def run_folder(config: DictConfig, config_path: str, output_path: str | None, *, lora: bool) -> Path:
    """The folder of a run, made and seen to be writable.

    output/<dataset>/<config name>, for a LoRA run output/<dataset>/<config name>/lora, unless output_path names it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    folder = Path(output_path) if output_path else OUTPUT_ROOT / config.data.kind / Path(config_path).stem
    if lora and not output_path:
        folder = folder / "lora"
    return ensure_writable(folder)


def save_config(folder: Path, config: DictConfig) -> None:
    """Write the resolved config of a run that is about to take its first step."""
    write_atomically(folder / "config.yaml", lambda path: path.write_text(OmegaConf.to_yaml(config)))


def make_trainable(model: DiffusionModel, config: DictConfig, *, lora: bool) -> None:
    """Freeze everything but the network, or but fresh LoRAs: `lora:` of it, `text_encoder_lora:` of the text encoder."""
    model.requires_grad_(False)
    if lora:
        for part, section in ((model.network, "lora"), (model.text_encoder, "text_encoder_lora")):
            if section in config:
                given = OmegaConf.to_container(config[section])
                not_its_own = ("training", "optimizer", "learning_rate")
                apply_lora_to_model(part, **{k: v for k, v in given.items() if k not in not_its_own})
    else:
        model.network.requires_grad_(True)


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
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    """Parameters without those of adapters."""
    return sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)
