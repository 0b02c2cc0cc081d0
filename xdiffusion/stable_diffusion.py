"""Stable Diffusion with LoRA in a few calls, for scripts and notebooks; thin over the parts that the commands use.

models = preload_models_with_lora("v1-5-pruned-emaonly.safetensors", "cuda", lora_rank=4)
... train get_lora_parameters(models["diffusion"]) ...
save_models_lora(models, "style.safetensors")
images = generate("a beautiful landscape", models=models, steps=20)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from xdiffusion.as_trained import as_trained
from xdiffusion.build import build_sampling, override, set_process
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.native import lora_file
from xdiffusion.config_files import assignment
from xdiffusion.loading import load_model, tell_remarks
from xdiffusion.lora.adapters import remove_lora, set_lora_enabled, set_lora_scale, swap_lora
from xdiffusion.lora.inject import apply_lora_to_model, check_unmerged, lora_layers
from xdiffusion.lora.settings import DEFAULT_ADAPTER, LoRAError
from xdiffusion.lora.weights import load_lora_weights, save_lora_weights
from xdiffusion.model import DiffusionModel, generators_for
from xdiffusion.model import generate as generate_images
from xdiffusion.samplers.image_to_image import StartImage


class Models(TypedDict):
    """A loaded model by its parts.

    diffusion: the UNet. clip: the text encoder. autoencoder: between images and latents.
    model: the three together, as `xdiffusion.model` has it. base_config: what it was built from. config: the same, but
    for what the LoRA was trained to be drawn by. lora_words: the learned words that came with the LoRA.
    """

    diffusion: nn.Module
    clip: nn.Module
    autoencoder: nn.Module
    model: DiffusionModel
    base_config: DictConfig
    config: DictConfig
    lora_words: set[str]


def preload_models_with_lora(
    ckpt_path: str | Path,
    device: str | torch.device = "cpu",
    lora_rank: int = 4,
    lora_alpha: float = 1.0,
    lora_dropout: float = 0.0,
    apply_to_diffusion: bool = True,
    apply_to_clip: bool = False,
    *,
    ema: bool | None = None,
) -> Models:
    """A frozen model with a fresh LoRA on its attentions, which changes no bit of its output before it is trained.

    Args:
        ckpt_path: see `loading.load_model`.
        device: where everything goes.
        lora_rank, lora_alpha, lora_dropout: see `apply_lora_to_model`.
        apply_to_diffusion, apply_to_clip: which parts get one.
        ema: of a file that holds its UNet twice, see `read_stable_diffusion`.

    Raises:
        CheckpointError: if the file is missing, damaged or no model.
        LoRAError: for a rank or dropout that the layers cannot have, or if no part is to have a LoRA.
    """
    if not (apply_to_diffusion or apply_to_clip):
        raise LoRAError("a LoRA on neither part: set apply_to_diffusion or apply_to_clip")
    model, config = load_model(ckpt_path, ema=ema)
    for part, chosen in ((model.network, apply_to_diffusion), (model.text_encoder, apply_to_clip)):
        if chosen:
            apply_lora_to_model(part, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout)
    model.to(device)
    return {
        "diffusion": model.network,
        "clip": model.text_encoder,
        "autoencoder": model.autoencoder,
        "model": model,
        "base_config": config,
        "config": config,
        "lora_words": set(),
    }


def save_models_lora(models: Models, path: str | Path) -> Path:
    """Write the LoRA of all parts, and all learned words, into one file of this project's format; `lora convert` makes others.

    Args:
        models: with the LoRA of `preload_models_with_lora` or `load_lora_into_models`.
        path: where a name ends in .pt, .safetensors takes its place, as everywhere here.

    Returns:
        Where it was written.

    Raises:
        LoRAError: if no part has a LoRA, or one is merged.
    """
    check_unmerged(models["model"], DEFAULT_ADAPTER, "saving the LoRA")  # else the base's hash would be of the two
    base_hash = content_hash(models["model"].base_weights())
    config, tokens = OmegaConf.to_container(models["config"]), models["clip"].learned_tokens()
    return save_lora_weights(models["model"], path, base_hash=base_hash, config=config, tokens=tokens)


def load_lora_into_models(models: Models, path: str | Path, scale: float = 1.0, *, allow_other_base: bool = False) -> Models:
    """Put a LoRA of any format, with its learned words, in the place of the one that the models have; print what was matched.

    The models draw by the prediction and the schedule that it was trained with, where its file says them, else by the base's.

    An optimizer keeps its parameters where the shapes stay. On an error the models are as before.

    Args:
        models: with a LoRA or without.
        path: see `load_lora_weights`.
        scale: strength at run time.
        allow_other_base: take a LoRA that was trained on other weights of this shape.

    Returns:
        The same models.

    Raises:
        CheckpointError, LoRAError: see `load_lora_weights`.
    """
    model = models["model"]
    check_unmerged(model, None, "loading another LoRA")
    identity = {"base_hash": content_hash(model.base_weights()), "allow_other_base": allow_other_base}
    notes: list[str] = []
    config = as_trained(models["base_config"], [lora_file(path)], notes.append)
    replaced = models["lora_words"]
    others = models["clip"].learned_ids.keys() - replaced
    report = load_lora_weights(model, path, scale=scale, adapter_name="incoming", replaced_words=replaced, **identity)
    models["lora_words"] = models["clip"].learned_ids.keys() - others
    incoming = {n: layer.factors("incoming") for n, layer in lora_layers(model) if "incoming" in layer.adapters}
    remove_lora(model, "incoming")
    swap_lora(model, incoming)
    set_lora_scale(model, scale, DEFAULT_ADAPTER)
    set_lora_enabled(model, True, DEFAULT_ADAPTER)
    set_process(model, config)
    models["config"] = config
    print(f"{path}: {report}")
    for note in notes:  # now that it fits: of a LoRA of another base they would say nothing
        print(note, file=sys.stderr)
    return models


def generate(
    prompt: str | Sequence[str],
    *,
    models: Models,
    seed: int = 0,
    start_image: StartImage | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    **sampling: Any,
) -> Float[Tensor, "B 3 H W"]:
    """Images in [-1, 1] on the CPU, one per prompt; `pictures.as_picture` makes one of them a picture.

    Args:
        prompt: one, or several.
        models: of `preload_models_with_lora`.
        seed: image i is drawn from the noise of seed + i; dropout is off meanwhile.
        start_image: for img2img and inpainting, see `image_to_image.StartImage`.
        height, width: of the images, in pixels; None: the model's own.
        batch_size: images drawn at a time.
        sampling: keys of the config's section `sampling:`, such as steps=20, cfg_scale=7.5, negative_prompt="blurry", or
            sampler={"kind": "euler"}.

    Raises:
        ConfigError: for a key or value that this section does not allow.
        ValueError: if the start image, a side, the seed or a prompt is wrong, or there is no prompt.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not isinstance(start_image, StartImage | None):
        raise ValueError(f"start_image={start_image!r:.80} is no StartImage(images) of xdiffusion.samplers.image_to_image")
    model = models["model"]
    plain = {key: v.item() if hasattr(v, "item") else v for key, v in sampling.items()}  # numpy's numbers
    assignments = [assignment(f"sampling.{key}", value) for key, value in plain.items()]
    config = override(models["config"], assignments, "generate")
    settings = build_sampling(config, model.schedule)
    generators = generators_for(seed, len(prompts))
    tell_remarks(model, config, [*prompts, config.sampling.negative_prompt])
    _, *usual = model.image_shape
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model.resize(height or usual[0], width or usual[1])
        return generate_images(model, prompts, generators, start_image=start_image, batch_size=batch_size, **settings)
    finally:
        model.resize(*usual)
        for module in training:
            module.training = True
