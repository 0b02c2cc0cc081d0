"""Batches from memory beside a per-image PIL pipeline: images per second.

    python bench/data.py --data_dir ../shared/data/mnist8k
    python bench/data.py                                        (the embedded digits)

Ours is what a training step does for its batch: `DataOrder` draws the shuffled indices, `ImageSet.batch` scales the
images (resized once, when they were loaded) and words the captions. Theirs is a shuffled torch DataLoader, without
workers as diffusers' tutorials have it, over a data set as torchvision's MNIST: for every image and epoch
PIL.Image.fromarray, Resize, ToTensor, Normalize. Both make 32x32 float32 images in [-1, 1] of 28x28 originals; one
measurement is a number of batches in a row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import torch
from measure import Goal, Report, interleave, parser, prepare
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xdiffusion.cli import positive_int, run
from xdiffusion.data.digits import load_digits
from xdiffusion.data.image_set import ImageSet
from xdiffusion.data.torchvision_sets import load_mnist
from xdiffusion.training.randomness import DataOrder

SOURCE_SIZE = 28
GOAL = Goal(30.0, ">=")


class PILImages(Dataset):
    """Images of 0..255 with labels, transformed one by one as torchvision.datasets.MNIST does."""

    def __init__(self, originals: ImageSet, image_size: int):
        from torchvision import transforms

        self.images = originals.train.images[:, 0]
        self.labels = originals.train.labels
        steps = [transforms.Resize(image_size), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def our_batches(images: ImageSet, batch_size: int) -> Callable[[], Tensor]:
    """The next batch's images, in the order of a training run."""
    order, steps = DataOrder(len(images.train), batch_size, seed=0), itertools.count()
    wording = torch.Generator().manual_seed(0)

    def next_batch() -> Tensor:
        return images.batch(order.indices(next(steps)), torch.rand(batch_size, generator=wording)).images

    return next_batch


def peer_batches(originals: ImageSet, image_size: int, batch_size: int, workers: int) -> Callable[[], Tensor]:
    """The same from a DataLoader, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        PILImages(originals, image_size),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        generator=generator,
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return lambda: next(batches)[0]


def images_per_second(next_batch: Callable[[], Tensor], batches: int) -> Callable[[], float]:
    """A timer of so many batches in a row."""

    def rate() -> float:
        started = time.perf_counter()
        images = sum(len(next_batch()) for _ in range(batches))
        return images / (time.perf_counter() - started)

    return rate


def originals_and_resized(args: argparse.Namespace) -> tuple[ImageSet, ImageSet]:
    """The data at its own size, for PIL, and at the model's, for us."""
    if args.data_dir:
        return load_mnist(SOURCE_SIZE, args.data_dir), load_mnist(args.image_size, args.data_dir)
    return load_digits(SOURCE_SIZE), load_digits(args.image_size)


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(__doc__, rounds=11)
    flags.add_argument("--data_dir", metavar="DIR", help="a folder that torchvision's MNIST reads; without it the digits")
    flags.add_argument("--image_size", type=positive_int, default=32, metavar="N", help="side of the batches' images (32)")
    flags.add_argument(
        "--batch_size", nargs="+", type=positive_int, default=[64, 128], metavar="N", help="images per batch (64 128)"
    )
    flags.add_argument(
        "--batches",
        type=positive_int,
        default=20,
        metavar="N",
        help="theirs per measurement, ours 10 times as many (20)",
    )
    flags.add_argument("--workers", type=int, default=0, metavar="N", help="of the DataLoader (0)")
    args = flags.parse_args(argv)
    prepare(args)
    report = Report(args)
    originals, resized = originals_and_resized(args)
    for batch_size in args.batch_size:
        timers = {
            "ours": images_per_second(our_batches(resized, batch_size), 10 * args.batches),
            "theirs": images_per_second(peer_batches(originals, args.image_size, batch_size, args.workers), args.batches),
        }
        rates = interleave(timers, args.rounds)
        details = {"dataset": resized.name, "image_size": args.image_size, "workers": args.workers}
        report.add(f"data_batch_{batch_size}", **rates, unit="images/s", goal=GOAL, **details)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
