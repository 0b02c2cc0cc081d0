"""Writing a latent diffusion model as a folder of the diffusers library, which its pipelines open without a network.

model_index.json, scheduler/, text_encoder/, tokenizer/, unet/, vae/
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.diffusers import (
    autoencoder_to_diffusers,
    text_encoder_to_transformers,
    unet_to_diffusers,
)
from xdiffusion.checkpoints.files import CheckpointError, ensure_writable, save_safetensors
from xdiffusion.checkpoints.native import ModelFile

_VERSION = "0.21.0"  # the oldest diffusers for which these settings are whole
_EXPRESSIBLE = {
    "network": {"patch_size": 1, "ff_mult": 4, "resample": "conv", "qk_norm": False, "out_channels": None},
    "text_encoder": {"kind": "clip"},
    "autoencoder": {"kind": "kl"},
}
_SPACINGS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def check_expressible(config: Mapping[str, Any], format: str) -> None:
    """See that a model can be written as Stable Diffusion.

    Raises:
        CheckpointError: naming the key whose value `format` has no word for.
    """
    for part, needed in _EXPRESSIBLE.items():
        for key, value in needed.items():
            if config["model"][part].get(key) != value:
                raise CheckpointError(
                    f"model.{part}.{key}={config['model'][part].get(key)}: {format} knows {value} only"
                )
    if config["model"]["network"]["projection"] == "none" or config["diffusion"]["schedule"]["kind"] != "betas":
        raise CheckpointError(f"{format} knows no UNet with projection=none, and no schedule but betas")


def write_diffusers_folder(
    folder: Path, file: ModelFile, config: Mapping[str, Any], vocabulary: Mapping[str, int], merges: Sequence[str]
) -> None:
    """Write a model as a pipeline's folder, whole or not at all.

    Args:
        folder: must not be there yet.
        file: tensors by our names.
        config: resolved, of that model.
        vocabulary, merges: of the tokenizer: id by token, and "a b" in order.

    Raises:
        CheckpointError: if the folder is there or cannot be written, or diffusers cannot express the model.
    """
    check_expressible(config, "diffusers")
    if folder.exists():
        raise CheckpointError(f"{folder} is there already; a folder is not overwritten")
    model, text = config["model"], config["model"]["text_encoder"]
    latent_size = config["data"]["image_size"] // 2 ** (len(model["autoencoder"]["widths"]) - 1)
    parts = {
        "unet": (unet_to_diffusers, "network", unet_settings(model["network"], text["width"], latent_size)),
        "vae": (autoencoder_to_diffusers, "autoencoder", autoencoder_settings(model["autoencoder"], config)),
        "text_encoder": (text_encoder_to_transformers, "text_encoder", text_encoder_settings(text)),
    }
    parent = ensure_writable(folder.absolute().parent)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}.") as temporary:
        copy = Path(temporary) / folder.name
        for component, (table, part, settings) in parts.items():
            weights = table(_below(file.tensors, f"{part}."))
            name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
            save_safetensors(copy / component / f"{name}.safetensors", weights, {"format": "pt"})
            _write_json(copy / component / "config.json", settings)
        _write_json(copy / "scheduler" / "scheduler_config.json", scheduler_settings(config["diffusion"]))
        _write_json(copy / "model_index.json", _MODEL_INDEX)
        _write_json(copy / "tokenizer" / "vocab.json", vocabulary)
        (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        _write_json(copy / "tokenizer" / "tokenizer_config.json", tokenizer_settings(text))
        copy.rename(folder)


def unet_settings(network: Mapping[str, Any], context_dim: int, latent_size: int) -> dict[str, Any]:
    """config.json of a UNet2DConditionModel; its attention_head_dim is the number of heads (its known misnomer)."""
    depth, widths = network["transformer_depth"], network["channels"]
    heads = network["num_heads"] or [width // network["head_dim"] for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _VERSION,
        "sample_size": latent_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        "transformer_layers_per_block": [max(1, d) for d in depth],
        "cross_attention_dim": context_dim,
        "attention_head_dim": heads,
        "use_linear_projection": network["projection"] == "linear",
        "norm_num_groups": network["norm_groups"],
        "resnet_time_scale_shift": "scale_shift" if network["time_conditioning"] == "scale_shift" else "default",
    }


def autoencoder_settings(autoencoder: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an AutoencoderKL."""
    levels = len(autoencoder["widths"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _VERSION,
        "sample_size": config["data"]["image_size"],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": autoencoder["latent_channels"],
        "block_out_channels": autoencoder["widths"],
        "layers_per_block": autoencoder["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": autoencoder["norm_groups"],
        "scaling_factor": autoencoder["scale_factor"],
    }


def text_encoder_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "projection_dim": text["embed_dim"] or text["width"],
        "vocab_size": 49408,
        "hidden_act": text["activation"],
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if text["pad_with_end_token"] else 0,
    }


def scheduler_settings(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of a DDIMScheduler, from which diffusers makes its other schedulers."""
    schedule = diffusion["schedule"]
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _VERSION,
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": _SPACINGS[schedule["spacing"]],
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[diffusion["prediction"]],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
    }


def tokenizer_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of a CLIPTokenizer; token 0, with which 2.x pads, is the exclamation mark."""
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if text["pad_with_end_token"] else "!",
        "model_max_length": text["context_length"],
        "do_lower_case": True,
    }


_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": _VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
