"""Setting up a run: its folder, which weights it trains, and what it tells of itself."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from xdiffusion.checkpoints.files import ensure_writable, remove_leftovers, write_atomically
from xdiffusion.lora.adapters import get_lora_parameters
from xdiffusion.lora.inject import apply_lora_to_model, lora_layers
from xdiffusion.model import DiffusionModel
from xdiffusion.training.divergence import TrainingDiverged, write_report
from xdiffusion.training.loop import Trainer
from xdiffusion.training.run_record import RunRecord
from xdiffusion.training.state import RunCheckpoints
from xdiffusion.training.textual_inversion import TextualInversionSettings, learn_token

OUTPUT_ROOT = Path("output")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


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


def begin(
    trainer: Trainer, checkpoints: RunCheckpoints, config: DictConfig, command: list[str], first_step: int
) -> RunRecord:
    """Prepare the folder of a run that is about to take its first step: clean up, config.yaml, run.json.

    The first process alone writes; the record of another one is kept nowhere.
    """
    folder = checkpoints.folder
    writes = trainer.accelerator.is_main_process
    if writes:
        for place in (folder, folder / "samples"):
            remove_leftovers(place)
        checkpoints.set_aside(after=first_step - 1)
        if checkpoints.path(first_step - 1).is_file():
            checkpoints.rotate()  # what a run that was killed had not come to
    device, processes = trainer.accelerator.device, trainer.accelerator.num_processes
    record = RunRecord(folder if writes else None, config, command, trainer.data, device, processes, first_step)
    for change in record.changes:
        print(f"resumed under other conditions: {change}", file=sys.stderr)
    if writes:
        write_atomically(folder / "config.yaml", lambda path: path.write_text(OmegaConf.to_yaml(config)))
    return record


def go_back(trainer: Trainer, checkpoints: RunCheckpoints, error: TrainingDiverged) -> int:
    """After a divergence, put the last good checkpoint back and choose other noise; returns the next step.

    Raises:
        TrainingDiverged: the same, with diverged.json written, if there is no checkpoint or training.rollbacks are used up.
    """
    checkpoints.finish()
    if trainer.accelerator.is_main_process:
        write_report(checkpoints.folder, error)
    trainer.accelerator.wait_for_everyone()  # for what the first process was writing
    rollbacks = trainer.rollbacks + 1
    if rollbacks > trainer.settings.rollbacks or checkpoints.newest() is None:
        raise error
    first_step = 1 + checkpoints.resume(trainer, "auto")
    trainer.rollbacks = rollbacks
    return first_step


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
                not_its_own = ("training", "optimizer", "learning_rate")
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
