"""Where a text encoder's weights come from before the UNet trains: our own tiny CLIP, a file, open_clip, or chance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.open_clip import text_encoder_from_open_clip
from xdiffusion.checkpoints.paths import SAFETENSORS
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import ensure_writable, save_safetensors
from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.open_clip import download_open_clip_weights
from xdiffusion.training.contrastive import ContrastiveModel, ContrastiveTask, zero_shot_accuracy
from xdiffusion.training.loop import Trainer, averaged
from xdiffusion.training.previews import draw_similarities
from xdiffusion.training.run import train
from xdiffusion.training.run_record import data_fingerprint
from xdiffusion.training.settings import settings_of
from xdiffusion.training.state import RunCheckpoints
from xdiffusion.training.weights_files import ClipWeights

TINY = "tiny"
OTHERWISE = (
    "add --set model.text_encoder.pretrained=null for random frozen weights, or take a config whose text encoder is "
    "pretrained: tiny, which is trained here in under a minute"
)
# of the section training:, what decides over a tiny CLIP's weights
DECISIVE = ("num_training_steps", "batch_size", "gradient_accumulation_steps", "ema_decay", "mixed_precision", "seed")


def initialise_text_encoder(
    encoder: CLIPTextEncoder, config: DictConfig, tiny: Path, say: Callable[[str], None] = print
) -> None:
    """Fill a fresh text encoder as `model.text_encoder.pretrained` says, and freeze it.

    null: the random weights it has. "tiny": our own CLIP of this data set and size, at the path `tiny`. A path: a file that
    `training/clip/train.py` wrote. Anything else: a tag of open_clip for a `kind: open_clip` encoder.

    Raises:
        ValueError: for an unknown tag, a download that fails, or a file that does not fit.
    """
    slot = config.model.text_encoder
    pretrained = slot.pretrained
    if pretrained is None:
        say("text encoder: random frozen weights")
    elif slot.kind == "open_clip":
        published = download_open_clip_weights(slot.model_name, pretrained, "model.text_encoder.pretrained", OTHERWISE)
        weights = text_encoder_from_open_clip(published)
        _load(encoder, weights, f"{slot.model_name}/{pretrained}")
    elif pretrained == TINY or pretrained.endswith(SAFETENSORS):
        path = tiny if pretrained == TINY else Path(pretrained)
        load_text_encoder(encoder, path)
        say(f"text encoder: {path}")
    else:
        raise ValueError(
            f"model.text_encoder.pretrained={pretrained!r}: for kind clip allowed are tiny, null, or a .safetensors file; "
            "published weights need kind: open_clip and a model_name"
        )
    encoder.requires_grad_(False).eval()


def train_tiny_clip(
    encoder: CLIPTextEncoder,
    config: DictConfig,
    data: ImageSet,
    path: Path,
    *,
    script: str,
    words: Sequence[str],
    resume_from: str | None,
    force_cpu: bool = False,
) -> int:
    """Train both towers, a run like every other, in the folder of the path's name; at its end write the text tower.

    Args:
        encoder: the text tower, fresh.
        config: `clip_config`'s.
        path: of the text tower.
        script, words, resume_from: see `train`.

    Returns:
        The exit status.

    Raises:
        ValueError: for data without classes.
    """
    if not isinstance(data, ImageSet):
        raise ValueError(
            f"pretrained=tiny is trained on a set with classes, which {data.name} is not: take a text encoder of your own "
            "(--set model.text_encoder.pretrained=FILE.safetensors), a random one (=null), a published CLIP (kind=open_clip "
            "and a model_name), or load a trained model with --load_model_weights_from_checkpoint"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = ContrastiveModel(encoder, image_size=data.image_size, channels=data.channels)
    settings = settings_of(config, "training"), settings_of(config, "optimizer")
    trainer = Trainer(ContrastiveTask(model, data, *settings), force_cpu=force_cpu)
    checkpoints = RunCheckpoints(ensure_writable(path.with_suffix("")), ClipWeights(config))
    draw = partial(draw_similarities, model, data)
    status = train(trainer, checkpoints, config, draw, script=script, words=words, resume_from=resume_from)
    if status == 0:
        with averaged(trainer):
            accuracy = zero_shot_accuracy(model, data)
            metadata = {
                "format": "xdiffusion-text-encoder",
                "dataset": data.name,
                "zero_shot_accuracy": f"{accuracy:.4f}",
            }
            if trainer.accelerator.is_local_main_process:
                save_safetensors(path, encoder.state_dict(), metadata)
        print(f"tiny CLIP: zero-shot accuracy {accuracy:.3f} on held-out {data.name}: {path}")
    return status


def tiny_clip_path(config: DictConfig, data: Any, output_root: Path) -> Path:
    """One file for each encoder and all that its weights depend on: the data, and how it is trained.

    Args:
        config: `clip_config`'s.
    """
    slot = config.model.text_encoder
    size = f"{config.data.image_size}px_width{slot.width}_layers{slot.layers}_heads{slot.heads}_tokens{slot.context_length}"
    training = {key: value for key, value in config.training.items() if key in DECISIVE}
    encoder = {key: value for key, value in slot.items() if key not in ("kind", "pretrained")}
    made_by = json.dumps([encoder, training, OmegaConf.to_container(config.optimizer), data_fingerprint(data)])
    digest = hashlib.blake2b(made_by.encode(), digest_size=4).hexdigest()
    return output_root / config.data.kind / "clip" / f"clip_{size}_{digest}{SAFETENSORS}"


def load_text_encoder(encoder: CLIPTextEncoder, path: Path) -> None:
    """Read a text encoder's file into an encoder of its size.

    Raises:
        CheckpointError: if it is missing, damaged, or of another size.
    """
    tensors, _ = load_safetensors(path)
    _load(encoder, tensors, str(path))


def _load(encoder: CLIPTextEncoder, weights: dict, source: str) -> None:
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source} does not fit model.text_encoder: {shorten(str(error), 300, placeholder='...')}"
        ) from error
