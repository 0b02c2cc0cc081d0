"""DreamBooth's prior preservation ([DreamBooth] section 3.2): the class is trained beside the subject, so that it stays.

    L = mean of the subject's losses + weight * mean of the class images' losses         (up to one factor for both)

Half of each batch are class images: pictures of the class that the base model itself draws, or that the user has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from xdiffusion.checkpoints.files import ensure_writable, write_atomically
from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_folder import SUFFIXES, load_image_folder
from xdiffusion.model import DiffusionModel, generate, generators_for
from xdiffusion.pictures import as_picture, save_png

BLOCK = 4


@dataclass(frozen=True)
class PriorSettings:
    """The `prior:` section of a config.

    data_dir: folder of the class images; those that are missing are drawn by the base model.
    prompt: of the class, such as "a photo of a dog" where the subject is "a photo of sks dog".
    num_images: how many there should be.
    weight: of a class image in the loss, where one of the subject has 1.
    """

    data_dir: str
    prompt: str
    num_images: int = 200
    weight: float = 1.0

    def check(self) -> None:
        """Raise ValueError for values that no run can have."""
        if self.num_images < 1:
            raise ValueError(f"prior.num_images={self.num_images} must be at least 1")
        if self.weight <= 0:
            raise ValueError(f"prior.weight={self.weight} must be above 0; leave out the section prior: for none")


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
    settings = PriorSettings(**OmegaConf.to_container(config.prior))
    settings.check()
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
