"""MNIST, Fashion-MNIST and CIFAR-10 from a folder: read as torchvision reads them, or refused in one line."""

import hashlib
import pickle
import socket
import struct
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision.datasets
from fake_sets import write_idx, write_mnist
from PIL import Image

from xdiffusion.data import image_set
from xdiffusion.data.torchvision_sets import (
    DatasetUnavailable,
    load_cifar10,
    load_fashion_mnist,
    load_mnist,
    resize,
)
from xdiffusion.downloads import SECONDS_WITHOUT_ANSWER


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("load", "folder"), [(load_mnist, "MNIST"), (load_fashion_mnist, "FashionMNIST")])
def test_idx_files_are_read_from_a_folder(load, folder, tmp_path, numbers):
    written = {}
    (tmp_path / folder / "raw").mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        written[part] = numbers.integers(0, 256, (count, 28, 28)), numbers.integers(0, 10, count)
        for kind, array in zip(("images-idx3", "labels-idx1"), written[part]):
            write_idx(tmp_path / folder / "raw" / f"{part}-{kind}-ubyte", array)
    data = load(28, str(tmp_path))
    for split, part in ((data.train, "train"), (data.test, "t10k")):
        assert np.array_equal(split.images[:, 0], written[part][0])
        assert np.array_equal(split.labels, written[part][1])
    assert load(32, str(tmp_path)).train.images.shape == (5, 1, 32, 32)
    assert data.name == f"image/{'mnist' if folder == 'MNIST' else 'fashion_mnist'}"


def test_cifar_batches_are_read_from_a_folder(tmp_path, numbers, monkeypatch):
    cifar, folder, written = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name):
        written[name] = numbers.integers(0, 256, (2, 3, 32, 32)).astype(np.uint8), numbers.integers(0, 10, 2).tolist()
        return dump(name, {"data": written[name][0].reshape(2, -1), "labels": written[name][1]})

    monkeypatch.setattr(cifar, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [batch("test_batch")])
    name, checksum = dump("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "label_names", "md5": checksum})

    data = load_cifar10(32, str(tmp_path))
    assert data.channels == 3
    assert np.array_equal(data.train.images, np.concatenate([written[f"data_batch_{i}"][0] for i in range(1, 6)]))
    assert data.train.labels.tolist() == [label for i in range(1, 6) for label in written[f"data_batch_{i}"][1]]
    assert np.array_equal(data.test.images, written["test_batch"][0])
    assert load_cifar10(16, str(tmp_path)).test.images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("channels", "size", "new_size"), [(1, 28, 32), (1, 28, 24), (1, 28, 9), (3, 32, 24)])
def test_resizing_is_pils_antialiased_bilinear_filter(channels, size, new_size, generator):
    noise = torch.randint(0, 256, (6, channels, size, size), generator=generator, dtype=torch.uint8)
    ours = resize(noise, new_size).int()
    for image, resized in zip(noise, ours):
        planes = [Image.fromarray(plane.numpy()).resize((new_size, new_size), Image.Resampling.BILINEAR) for plane in image]
        difference = (resized - torch.from_numpy(np.stack(planes).astype(np.int32))).abs()
        assert difference.max() <= 1


def test_resizing_to_the_same_size_changes_nothing(generator):
    noise = torch.randint(0, 256, (2, 1, 28, 28), generator=generator, dtype=torch.uint8)
    assert torch.equal(resize(noise, 28), noise)


def test_a_folder_that_would_fill_the_memory_is_refused(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match="image_size=8000: 80 images of image/mnist take 5,120,000,000 bytes in memory"):
        load_mnist(8000, str(tmp_path))


def test_resizing_in_blocks_is_resizing_at_once(generator, monkeypatch):
    monkeypatch.setattr(image_set, "BLOCK_PIXELS", 4096 * 8**2)
    noise = torch.randint(0, 256, (4100, 1, 4, 4), generator=generator, dtype=torch.uint8)
    resized = resize(noise, 8)
    assert len(resized) == 4100
    assert torch.equal(resized[4090:], resize(noise[4090:], 8))


def test_real_mnist_digits(mnist8k):
    data = load_mnist(28, str(mnist8k))
    assert (len(data.train), len(data.test), data.image_size, data.channels) == (7000, 1000, 28, 1)
    assert (data.train.labels.bincount(minlength=10) > 500).all()
    assert load_mnist(32, str(mnist8k)).test.images.shape == (1000, 1, 32, 32)
    assert 25 < data.train.images.float().mean() < 40  # white on black: 33 of 255 on the whole set


@pytest.mark.parametrize("load", [load_mnist, load_fashion_mnist, load_cifar10])
def test_a_folder_without_the_data_is_named(load, tmp_path):
    with pytest.raises(DatasetUnavailable, match=rf"cannot be read from --data_dir {tmp_path}.*image/digits"):
        load(32, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"no digits here, but enough bytes for a header", struct.pack(">4i", 0x0803, 9, 28, 28)]
)
def test_damaged_files_are_named(content, tmp_path):
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            path = tmp_path / "MNIST/raw" / f"{part}-{kind}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with pytest.raises(DatasetUnavailable, match="image/mnist cannot be read from --data_dir"):
        load_mnist(28, str(tmp_path))


def test_pictures_of_other_classes_are_refused(tmp_path):
    raw = write_mnist(tmp_path) / "MNIST/raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(40) % 13)
    with pytest.raises(DatasetUnavailable, match=r"image/mnist of --data_dir .* has labels 0 to 12; .* 10 classes are 0 to 9"):
        load_mnist(28, str(tmp_path))


@pytest.mark.parametrize("number", [3, 99])
def test_labels_are_as_many_as_images(number, tmp_path):
    raw = write_mnist(tmp_path) / "MNIST/raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", np.zeros(number))
    with pytest.raises(DatasetUnavailable, match=rf"has {number} labels for 40 images"):
        load_mnist(28, str(tmp_path))


@pytest.mark.parametrize("before", [None, 77.0])
@pytest.mark.parametrize("load", [load_mnist, load_cifar10])
def test_an_unreachable_network_fails_fast_and_says_what_to_do(load, before, tmp_path, monkeypatch):
    timeouts = []

    def unreachable(*arguments, **keywords):
        timeouts.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    outside = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        with pytest.raises(DatasetUnavailable, match=r"cannot be downloaded .*no route to host.*--data_dir.*image/digits"):
            load(32)
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(outside)
    assert list(tmp_path.iterdir()) == []  # no empty folders of what was not downloaded
    assert 1 <= len(timeouts) <= 4  # a few mirrors at most, each waited for this long:
    assert set(timeouts) == {SECONDS_WITHOUT_ANSWER}
    assert SECONDS_WITHOUT_ANSWER <= 5


@pytest.mark.parametrize("load", [load_mnist, load_fashion_mnist, load_cifar10])
def test_a_size_below_the_smallest_is_refused_before_anything_is_read(load):
    with pytest.raises(ValueError, match="image_size=4 must be at least 8 for image/"):
        load(4)
