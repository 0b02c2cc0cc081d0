"""Setting up a run: its folder, which weights it trains, and what it tells of itself."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.checkpoints.files import ensure_writable, write_atomically
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
    """Freeze everything but the network, or but a fresh LoRA of it as the section `lora:` says."""
    model.requires_grad_(False)
    if lora:
        keys = ("rank", "alpha", "dropout", "target_modules")
        apply_lora_to_model(model.network, **{k: OmegaConf.to_container(config.lora)[k] for k in keys})
    else:
        model.network.requires_grad_(True)


def describe_model(model: DiffusionModel, config: DictConfig | None = None) -> str:
    """The config as YAML if given, then parameters by part and trainable ones; a LoRA's share is of the network."""
    lines = [OmegaConf.to_yaml(config)] if config is not None else []
    layers = lora_layers(model)
    lora = sum(p.numel() for _, layer in layers for f in (layer.lora_A, layer.lora_B) for p in f.values())
    network = _count(model.network) - lora
    lines.append(
        f"parameters: network {network:,}, text encoder {_count(model.text_encoder):,} (frozen), "
        f"autoencoder {_count(model.autoencoder):,} (frozen)"
    )
    if layers:
        share = lora / network
        lines.append(
            f"LoRA: {lora:,} trainable parameters in {len(layers)} layers, {share:.2%} of the network's {network:,}"
        )
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
