"""Files that are read and copied tensor by tensor, beside safetensors' own reader."""

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.checkpoints.streaming import StoredTensors, copy_safetensors

TENSORS = {
    "b.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "a.weight": torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "number": torch.tensor(7),
    "half": torch.ones(3, dtype=torch.float16),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_stored_tensors_are_a_mapping_like_the_one_in_memory(path):
    stored = StoredTensors(path)
    assert stored.metadata == {"format": "pt"}
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in TENSORS.items())
    assert all(stored.shape(name) == tensor.shape for name, tensor in TENSORS.items())
    assert content_hash(stored) == content_hash(TENSORS)
    with pytest.raises(KeyError):
        stored["other"]


def test_a_copy_differs_where_it_was_changed_and_nowhere_else(path, tmp_path):
    seen = []

    def change(name, tensor):
        return -tensor.T.contiguous().T if name.endswith("weight") else tensor  # a transposed memory layout too

    def progress(names):
        seen.extend(names)
        return names

    copy_safetensors(StoredTensors(path), tmp_path / "new/y.safetensors", change, {"note": "é"}, progress)
    copied, metadata = load_safetensors(tmp_path / "new/y.safetensors")
    assert metadata == {"note": "é"}
    assert {name: tensor.dtype for name, tensor in copied.items()} == {n: t.dtype for n, t in TENSORS.items()}
    assert all(torch.equal(copied[n], -t if n.endswith("weight") else t) for n, t in TENSORS.items())
    assert sorted(seen) == sorted(TENSORS)


def test_a_copy_that_fails_leaves_the_old_file(path, tmp_path):
    def broken(name, tensor):
        raise CheckpointError("no")

    before = path.read_bytes()
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(CheckpointError):
            copy_safetensors(StoredTensors(path), target, broken, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("letters", range(8))
def test_the_tensors_of_a_copy_are_aligned(letters, path, tmp_path):
    copy_safetensors(StoredTensors(path), tmp_path / "copy", lambda name, tensor: tensor, {"note": "x" * letters})
    assert int.from_bytes((tmp_path / "copy").read_bytes()[:8], "little") % 8 == 0


def test_a_file_may_be_copied_onto_itself(path):
    copy_safetensors(StoredTensors(path), path, lambda name, tensor: tensor, {})
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(path).items())


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        StoredTensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no file at"):
        StoredTensors(tmp_path / "missing.safetensors")


def test_more_tensors_are_held_than_files_may_be_open(tmp_path, monkeypatch):
    """Stable Diffusion has 1,130, and the usual limit of a shell is 1,024."""
    tensors = {str(i): torch.full((3,), float(i)) for i in range(300)}
    path = tmp_path / "many.safetensors"
    save_file(tensors, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        held = dict(StoredTensors(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    monkeypatch.setattr("xdiffusion.checkpoints.streaming.MAX_TENSORS", 299)
    with pytest.raises(CheckpointError, match="holds 300 tensors; allowed are 299"):
        StoredTensors(path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's maps")
def test_a_map_lives_as_long_as_a_tensor_of_it(path):
    def maps():
        return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    stored = StoredTensors(path)
    tensor = stored["b.weight"]
    row = tensor[1]
    del tensor
    assert maps() == 1 and torch.equal(row, TENSORS["b.weight"][1])
    del row
    assert maps() == 0

    torch.save(TENSORS, path)  # and of a pickled file: a model that converts its tensors one by one holds no two copies
    read = load_pickled(path, mmap=True)
    before = maps()
    del read["b.weight"]
    assert maps() == before - 1


def test_a_file_of_the_same_name_is_another_one(path):
    """A run may rotate or replace what is being read; and nobody may read behind the end of a file, or the system ends him."""
    stored = StoredTensors(path)
    save_file({name: torch.zeros(1) for name in TENSORS}, path.with_name("y.safetensors"))
    path.with_name("y.safetensors").replace(path)
    assert torch.equal(stored["b.weight"], TENSORS["b.weight"])
    shorter = StoredTensors(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* cannot be mapped \(the file has become shorter\)"):
        [shorter[name] for name in shorter]
