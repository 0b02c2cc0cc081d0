"""DreamBooth's prior preservation ([DreamBooth] section 3.2): the class is trained beside the subject, so that it stays.

    L = mean of the subject's losses + weight * mean of the class images' losses         (up to one factor for both)

Half of each batch are class images: pictures of the class that the base model itself draws, or that the user has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from xdiffusion.checkpoints.files import ensure_writable, write_atomically
from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_folder import SUFFIXES, load_image_folder
from xdiffusion.model import DiffusionModel, generate, generators_for
from xdiffusion.pictures import as_picture, save_png
from xdiffusion.training.settings import settings_of

BLOCK = 4


def prepare_class_images(
    model: DiffusionModel, config: DictConfig, sampling: Mapping[str, Any], device: torch.device | str = "cpu"
) -> CaptionedImages:
    """The class images of `prior:`, after the base model has drawn those that are missing.

    Args:
        model: the base, before it has an adapter.
        config: resolved.
        sampling: see `build_sampling`.
        device: to draw on; the model is on the CPU afterwards.

    Raises:
        ValueError: for settings that cannot be; a CheckpointError if the folder cannot be written.
    """
    settings = settings_of(config, "prior")
    folder = ensure_writable(Path(settings.data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    present = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    missing = range(present, settings.num_images)
    if missing:
        model.eval().to(device)
    for start in tqdm(missing[::BLOCK], desc="class images", unit=f"{BLOCK} pictures", leave=False, disable=None):
        numbers = range(start, min(start + BLOCK, settings.num_images))
        generators = generators_for(config.training.seed + start, len(numbers))
        images = generate(model, [settings.prompt] * len(numbers), generators, **sampling)
        for number, image in zip(numbers, images):
            write = partial(save_png, as_picture(image), metadata={"prompt": settings.prompt})
            write_atomically(folder / f"class_{number:04d}.png", write)  # the next run counts what stands there
    model.cpu()
    if missing:
        print(f"class images: {len(missing)} drawn of {settings.prompt!r} in {folder}")
    return load_image_folder(
        config.data.image_size,
        settings.data_dir,
        bucket_multiple=config.data.bucket_multiple,
        max_aspect=config.data.max_aspect,
        flip=config.data.flip,
        captions=[settings.prompt],
    )
