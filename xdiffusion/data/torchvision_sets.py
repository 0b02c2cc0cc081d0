"""MNIST, Fashion-MNIST and CIFAR-10 by torchvision: downloaded once, or read from a folder that holds them.

Each is read into one uint8 tensor and resized once, by the antialiased bilinear filter that PIL uses.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from xdiffusion.data.captions import PROMPT_TABLES
from xdiffusion.data.image_set import ImageSet, Split, check_fits, in_blocks
from xdiffusion.downloads import impatient
from xdiffusion.places import OUTPUT_ROOT, looked_for_in

DOWNLOAD_ROOT = OUTPUT_ROOT / "datasets"
PLACES = {  # of the files below a root
    "image/mnist": "MNIST/raw",
    "image/fashion_mnist": "FashionMNIST/raw",
    "image/cifar10": "cifar-10-batches-py",
}


class DatasetUnavailable(ValueError):
    """The data is neither on the disk nor to be had from the network."""


def load_mnist(image_size: int, data_dir: str | None = None) -> ImageSet:
    """`image/mnist`: 28x28 grey digits, 60,000 and 10,000 (or what data_dir holds).

    Args:
        image_size: side to resize to.
        data_dir: an existing torchvision root (`data_dir/MNIST/raw/...`); None downloads.

    Raises:
        DatasetUnavailable: within seconds, if the files are not there and cannot be downloaded, or are of other classes.
    """
    return _load("image/mnist", "MNIST", image_size, data_dir)


def load_fashion_mnist(image_size: int, data_dir: str | None = None) -> ImageSet:
    """`image/fashion_mnist`: 28x28 grey clothes; arguments as `load_mnist`, `data_dir/FashionMNIST/raw/...`."""
    return _load("image/fashion_mnist", "FashionMNIST", image_size, data_dir)


def load_cifar10(image_size: int, data_dir: str | None = None) -> ImageSet:
    """`image/cifar10`: 32x32 colour photographs; arguments as `load_mnist`, `data_dir/cifar-10-batches-py/...`."""
    return _load("image/cifar10", "CIFAR10", image_size, data_dir)


def _load(name: str, torchvision_name: str, image_size: int, data_dir: str | None) -> ImageSet:
    import torchvision.datasets

    if image_size < 8:
        raise ValueError(f"image_size={image_size} must be at least 8 for {name}")
    read = getattr(torchvision.datasets, torchvision_name)
    root = DOWNLOAD_ROOT if data_dir is None else Path(data_dir)
    try:
        with impatient():
            train, test = (read(root, train=train, download=data_dir is None) for train in (True, False))
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AssertionError) as error:
        said = str(error).partition(" You can use download=True")[0]  # which is no word of this project
        reason = textwrap.shorten(said, 200, placeholder=" ...") or "damaged files"
        if data_dir is None:
            _remove_empty(root)
        at = f"in {root / PLACES[name]}{'' if root.is_dir() else looked_for_in(root)}"
        where = f"cannot be read from --data_dir {root}, {at}" if data_dir else "cannot be downloaded"
        raise DatasetUnavailable(
            f"{name} {where} ({reason}). Point --data_dir at a folder that "
            f"torchvision.datasets.{torchvision_name}(root=FOLDER) reads, or use --dataset_name image/digits, "
            "which needs no download"
        ) from error
    for dataset in (train, test):
        if len(dataset.data) != len(dataset.targets):
            raise DatasetUnavailable(
                f"{name} of --data_dir {root} has {len(dataset.targets):,} labels for {len(dataset.data):,} images"
            )
    check_fits(name, len(train.data) + len(test.data), (*train.data.shape, 1)[3], image_size)  # (N, H, W), or with C
    splits, classes = [_split(dataset, image_size) for dataset in (train, test)], PROMPT_TABLES[name].num_classes
    for split in splits:
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= classes:
            raise DatasetUnavailable(
                f"{name} of --data_dir {root} has labels {low} to {high}; its {classes} classes are 0 to {classes - 1}"
            )
    return ImageSet(name, *splits, PROMPT_TABLES[name])


def _remove_empty(folder: Path) -> None:
    """Take away the folders without files that a failed download leaves, this one and those above it included."""
    for place in (*sorted(folder.rglob("*"), reverse=True), folder, folder.parent):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _split(dataset, image_size: int) -> Split:
    data = torch.as_tensor(np.asarray(dataset.data))
    images = data[:, None] if data.dim() == 3 else data.permute(0, 3, 1, 2)
    return Split(resize(images, image_size), torch.as_tensor(dataset.targets).long())


def resize(images: UInt8[Tensor, "N C H W"], image_size: int) -> UInt8[Tensor, "N C S S"]:
    """Antialiased bilinear resizing, in blocks so that the float copies stay small."""
    if images.shape[-2:] == (image_size, image_size):
        return images.contiguous()

    def resized(block: Tensor) -> Tensor:
        size = (image_size, image_size)
        return F.interpolate(block.float(), size=size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()

    return torch.cat([resized(block) for block in in_blocks(images, image_size)])
