"""Where a text encoder's weights come from before the UNet trains: our own tiny CLIP, a file, open_clip, or chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from xdiffusion.checkpoints.files import CheckpointError, load_safetensors, save_safetensors
from xdiffusion.checkpoints.open_clip import text_encoder_from_open_clip
from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.open_clip import download_open_clip_weights
from xdiffusion.training.contrastive import ContrastiveModel, train_contrastive, zero_shot_accuracy

TINY = "tiny"


def initialise_text_encoder(
    encoder: CLIPTextEncoder, config: DictConfig, data: ImageSet, output_root: Path, say: Callable[[str], None] = print
) -> None:
    """Fill a fresh text encoder as `model.text_encoder.pretrained` says, and freeze it.

    null: the random weights it has. "tiny": our own CLIP of this data set and size, trained now if it is not there yet.
    A path: a file that `training/clip/train.py` wrote. Anything else: a tag of open_clip for a `kind: open_clip` encoder.

    Raises:
        ValueError: for an unknown tag, a download that fails, or a file that does not fit.
    """
    slot = config.model.text_encoder
    pretrained = slot.pretrained
    if pretrained is None:
        say("text encoder: random frozen weights")
    elif slot.kind == "open_clip":
        weights = text_encoder_from_open_clip(download_open_clip_weights(slot.model_name, pretrained))
        _load(encoder, weights, f"{slot.model_name}/{pretrained}")
    elif pretrained == TINY:
        path = tiny_clip_path(config, output_root)
        if not path.is_file():
            say(f"text encoder: no tiny CLIP at {path} yet, training it")
            train_tiny_clip(encoder, config, data, path, say=say)
        load_text_encoder(encoder, path)
        say(f"text encoder: {path}")
    elif pretrained.endswith(".safetensors"):
        load_text_encoder(encoder, Path(pretrained))
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
    on_step: Callable[[int, float], None] | None = None,
    say: Callable[[str], None] = print,
) -> float:
    """Train both towers on the data's pairs, write the text tower, and return the zero-shot accuracy on held-out images.

    Raises:
        ValueError: for data without classes.
    """
    if not isinstance(data, ImageSet):
        raise ValueError(
            f"pretrained=tiny is trained on a set with classes, which {data.name} is not: load a trained model with "
            "--load_model_weights_from_checkpoint"
        )
    model = ContrastiveModel(encoder, image_size=data.image_size, channels=data.channels)
    settings = OmegaConf.to_container(config.clip)
    train_contrastive(model, data, seed=config.training.seed, on_step=on_step, **settings)
    accuracy = zero_shot_accuracy(model, data)
    metadata = {"format": "xdiffusion-text-encoder", "dataset": data.name, "zero_shot_accuracy": f"{accuracy:.4f}"}
    save_safetensors(path, encoder.state_dict(), metadata)
    say(f"tiny CLIP: zero-shot accuracy {accuracy:.3f} on held-out {data.name}")
    return accuracy


def tiny_clip_path(config: DictConfig, output_root: Path) -> Path:
    """One file per data set, image size and encoder size."""
    slot = config.model.text_encoder
    size = f"{config.data.image_size}px_width{slot.width}_layers{slot.layers}_heads{slot.heads}_tokens{slot.context_length}"
    return output_root / config.data.kind / "clip" / f"clip_{size}.safetensors"


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
            f"{source} does not fit model.text_encoder: {' '.join(str(error).split())[:300]}"
        ) from error
