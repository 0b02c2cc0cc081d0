"""DreamBooth's prior preservation ([DreamBooth] section 3.2): the class is trained beside the subject, so that it stays.

    L = mean of the subject's losses + weight * mean of the class images' losses         (up to one factor for both)

Half of each batch are class images: pictures of the class that the base model itself draws, or that the user has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from xdiffusion.checkpoints.writing import ensure_writable, write_atomically
from xdiffusion.data.captioned_images import CaptionedImages
from xdiffusion.data.image_folder import load_image_folder, picture_files
from xdiffusion.model import HALF, DiffusionModel, at_a_time, generate, generators_for, of_captions
from xdiffusion.pictures import as_picture, read_metadata, save_png
from xdiffusion.training.settings import settings_of

BLOCK = 4


def prepare_class_images(
    model: DiffusionModel,
    config: DictConfig,
    sampling: Mapping[str, Any],
    base_hash: str,
    device: torch.device | str = "cpu",
) -> CaptionedImages:
    """The class images of `prior:`, after the base model has drawn those that are missing, in the run's precision.

    Args:
        model: the base, before it has an adapter, with the prediction and the schedule that it was trained for.
        config: resolved, of that prediction.
        sampling: see `build_sampling`.
        base_hash: of the model's weights, kept in each picture that is drawn.
        device: to draw on; the model is on the CPU afterwards.

    Raises:
        ValueError: for settings that cannot be, or class images that another prompt or base has drawn, or in another size;
            a CheckpointError if the folder cannot be written.
    """
    settings = settings_of(config, "prior")
    folder = ensure_writable(Path(settings.data_dir))
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"prompt": settings.prompt, "image_size": str(config.data.image_size), "base": base_hash}
    drawn["prediction"] = config.diffusion.prediction
    _check_drawn(folder, drawn)
    free = (number for number in count() if not _path(folder, number).exists())
    missing = list(islice(free, max(0, settings.num_images - len(picture_files(folder)))))
    if missing:
        model.eval().to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # autocast keeps a copy in half precision of those that want a gradient
        parameter.requires_grad_(False)
    block = at_a_time(model, most=BLOCK)  # a card that trains has room for as much
    for start in tqdm(range(0, len(missing), block), "class images", unit=f"{block} pictures", leave=False, disable=None):
        numbers = missing[start : start + block]
        generators = [generators_for(config.training.seed + number, 1)[0] for number in numbers]
        precision = HALF.get(config.training.mixed_precision)
        images = generate(model, [settings.prompt] * len(numbers), generators, autocast=precision, **of_captions(sampling))
        for number, image in zip(numbers, images):
            write = partial(save_png, as_picture(image), metadata=drawn)
            write_atomically(_path(folder, number), write)  # the next run counts what stands there
    for parameter in trained:
        parameter.requires_grad_(True)
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


def _path(folder: Path, number: int) -> Path:
    return folder / f"class_{number:04d}.png"


def _check_drawn(folder: Path, drawn: Mapping[str, str]) -> None:
    """Complain of class images that another prompt or base has drawn, or in another size."""
    for path in sorted(folder.glob("class_*.png")):
        try:
            said = read_metadata(path)  # the user's own say nothing
        except ValueError:  # damaged: skipped and named where they are loaded
            continue
        for key, value in drawn.items():
            if said.get(key, value) != value:
                raise ValueError(
                    f"{path} was drawn with {key} {said[key]!r}, this run's is {value!r}: name another prior.data_dir, or "
                    "remove those"
                )
