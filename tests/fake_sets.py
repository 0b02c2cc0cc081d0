"""Tiny folders in the layouts that torchvision reads, for tests without a download."""

import pickle
import struct
from pathlib import Path

import numpy as np

COUNT = 40


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes in the format of MNIST's files: magic number with the rank, sizes, data."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, name: str = "MNIST") -> Path:
    """Random 28x28 pictures of ten classes below root/name/raw."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", random.integers(0, 256, (COUNT, 28, 28)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(COUNT) % 10)
    return root


def write_cifar10(root: Path) -> Path:
    """Random 32x32 colour pictures of ten classes below root/cifar-10-batches-py; torchvision's checksums do not fit."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {
            "data": random.integers(0, 256, (COUNT, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(COUNT)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    return root
