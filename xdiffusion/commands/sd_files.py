"""Writing a model of Stable Diffusion in the layout asked for, so that reading it gives the model back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from xdiffusion.build import image_shape
from xdiffusion.checkpoints.diffusers_folder import write_diffusers_folder
from xdiffusion.checkpoints.diffusers_settings import config_from, folder_settings
from xdiffusion.checkpoints.drawing_settings import PROCESS
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.native import ModelFile, save_model
from xdiffusion.checkpoints.paths import PICKLED
from xdiffusion.checkpoints.stable_diffusion import from_original, to_original, with_text_projection
from xdiffusion.checkpoints.stable_diffusion_files import StableDiffusionFile, header_of_original, recognise_original
from xdiffusion.checkpoints.writing import save_pickled, save_safetensors
from xdiffusion.loading import ARCHITECTURE, config_differences, stable_diffusion_config
from xdiffusion.text_encoders.tokenizer import vocabulary

KINDS = {"model.text_encoder.kind": "clip", "model.autoencoder.kind": "kl", "diffusion.schedule.kind": "betas"}
SHARED_SPACE = "model.text_encoder.embed_dim"  # of texts and images: no picture depends on it


def write_model(file: ModelFile, config: DictConfig, output: Path, layout: str) -> None:
    """Write a model under the names of a layout, without the learned words that it may have.

    Args:
        file: tensors by our names.
        config: resolved, of that model.
        output: a file, or for "diffusers" a folder that is not there yet.
        layout: "original", "diffusers" or "native".

    Raises:
        CheckpointError: if the output cannot be written, or the layout has no words for the model.
    """
    unused = file.stable_diffusion.unused if file.stable_diffusion else {}
    if unused and layout != "original":
        print(
            f"left out: {len(unused)} tensors of {file.path} which no picture depends on, such as {next(iter(unused))}",
            file=sys.stderr,
        )
    if layout == "native":
        if output.suffix != ".safetensors":
            raise CheckpointError(f"{output}: a native model is a .safetensors file")
        plain = OmegaConf.to_container(config)
        save_model(output, file.tensors, config=plain, image_shape=image_shape(config), step=file.step)
        return
    for key, needed in KINDS.items():
        if OmegaConf.select(config, key) != needed:
            raise CheckpointError(f"{key}={OmegaConf.select(config, key)}: {layout} knows {needed} only")
    if layout == "diffusers":
        _write_folder(file, config, output)
    else:
        _write_original(file, config, output, unused)


def _write_folder(file: ModelFile, config: DictConfig, output: Path) -> None:
    if output.suffix in (".safetensors", *PICKLED):
        raise CheckpointError(f"{output}: diffusers' layout is a folder; name one without {output.suffix}")
    plain = OmegaConf.to_container(config)
    try:
        said = config_from(folder_settings(plain), config.model.text_encoder.layers)
    except ValueError as error:
        raise CheckpointError(f"diffusers has no word for this model: {error}") from error
    _check_read_back(config, StableDiffusionFile({}, "sd15", said), "diffusers", output)
    write_diffusers_folder(output, file.tensors, plain, *vocabulary())


def _write_original(file: ModelFile, config: DictConfig, output: Path, unused: Mapping[str, Tensor]) -> None:
    if output.suffix not in (".safetensors", *PICKLED):
        raise CheckpointError(f"{output}: an original file ends in .safetensors or {', '.join(PICKLED)}")
    if config.diffusion.prediction not in ("eps", "v"):
        raise CheckpointError(f"diffusion.prediction={config.diffusion.prediction}: original has no word for it")
    openai = config.model.text_encoder.activation == "quick_gelu"  # 1.x has OpenAI's encoder, 2.x OpenCLIP's
    tensors = to_original({**file.tensors, **unused}, "transformers" if openai else "open_clip")
    read_back = with_text_projection(from_original(tensors))
    if read_back.keys() != file.tensors.keys():
        raise CheckpointError(
            f"{file.path} has levels that the original layout knows no names for: it has two residual blocks per level, "
            "attention at all levels of the UNet but the last, and four levels in the autoencoder"
        )
    header, marks = header_of_original(OmegaConf.to_container(config), output.stem)
    header = header if output.suffix == ".safetensors" else {}
    _check_read_back(config, recognise_original(output, read_back, marks.keys(), header), "original", output)
    if header:
        save_safetensors(output, tensors | marks, header)
    else:
        whole = {name: t.contiguous().clone() for name, t in (tensors | marks).items()}  # of a map, all would be saved
        save_pickled(output, {"state_dict": whole})
    by_shapes = "eps" if openai else "v"
    if config.diffusion.prediction != by_shapes:
        takes = f"diffusers' from_single_file takes its shapes for a model of {by_shapes}"
        told = "give it config= a folder that says so (--to diffusers), or its scheduler the prediction_type"
        print(f"{output}: {takes}: {told}", file=sys.stderr)


def _check_read_back(config: DictConfig, found: StableDiffusionFile, layout: str, output: Path) -> None:
    """See that what will be read of the output is the config that it is written from.

    Raises:
        CheckpointError: naming the first key whose value the layout has no word for.
    """
    read_back = stable_diffusion_config(found, str(output))
    for key, ours, theirs in config_differences(config, read_back, (*ARCHITECTURE, *PROCESS)):
        if key != SHARED_SPACE:
            raise CheckpointError(f"{key}={ours}: {layout} has no word for it, and {output} would be read with {theirs}")
    for key, ours, theirs in config_differences(config, read_back, ("data.image_size",)):
        print(f"{key}={ours} is not in {output}: whoever reads it will draw {theirs} if not told", file=sys.stderr)
