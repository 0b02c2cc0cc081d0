"""Writing a model of Stable Diffusion in the layout asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from xdiffusion.build import image_shape
from xdiffusion.checkpoints.diffusers_folder import check_expressible, write_diffusers_folder
from xdiffusion.checkpoints.files import PICKLED, CheckpointError, save_safetensors, write_atomically
from xdiffusion.checkpoints.native import ModelFile, save_model
from xdiffusion.checkpoints.stable_diffusion import from_original, to_original, with_text_projection
from xdiffusion.checkpoints.stable_diffusion_files import PREDICTION_KEY
from xdiffusion.text_encoders.tokenizer import vocabulary


def write_model(file: ModelFile, config: DictConfig, output: Path, layout: str) -> None:
    """Write a model under the names of a layout.

    Args:
        file: tensors by our names.
        config: resolved, of that model.
        output: a file, or for "diffusers" a folder that is not there yet.
        layout: "original", "diffusers" or "native".

    Raises:
        CheckpointError: if the output cannot be written, or the layout has no words for the model.
    """
    plain = OmegaConf.to_container(config)
    if layout == "diffusers":
        write_diffusers_folder(output, file, plain, *vocabulary())
    elif layout == "native":
        if output.suffix != ".safetensors":
            raise CheckpointError(f"{output}: a native model is a .safetensors file")
        save_model(output, file.tensors, config=plain, image_shape=image_shape(config), step=file.step)
    else:
        _write_original(file, config, output)


def _write_original(file: ModelFile, config: DictConfig, output: Path) -> None:
    check_expressible(config, "original")
    openai = config.model.text_encoder.activation == "quick_gelu"  # 1.x has OpenAI's encoder, 2.x OpenCLIP's
    tensors = to_original(file.tensors, "transformers" if openai else "open_clip")
    if with_text_projection(from_original(tensors)).keys() != file.tensors.keys():
        raise CheckpointError(
            f"{file.path} has levels that the original layout knows no names for: it has two residual blocks per level, "
            "attention at all levels of the UNet but the last, and four levels in the autoencoder"
        )
    if output.suffix == ".safetensors":
        prediction = {"eps": "epsilon"}.get(config.diffusion.prediction, config.diffusion.prediction)
        save_safetensors(output, tensors, {"format": "pt", PREDICTION_KEY: prediction})
    elif output.suffix in PICKLED:
        whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # of a map, all would be saved
        write_atomically(output, lambda temporary: torch.save({"state_dict": whole}, temporary))
    else:
        raise CheckpointError(f"{output}: an original file ends in .safetensors or {', '.join(PICKLED)}")
