"""Files are written whole or not at all, say what they are, run nothing, and fail with one kind of error."""

import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file, package_version, save_model
from xdiffusion.checkpoints.paths import existing_weights
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors, write_atomically

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2, 3])}
CONFIG = {"model": {"channels": [16, 32]}, "diffusion": {"prediction": "v"}}


def write_model(path):
    save_model(path, TENSORS, config=CONFIG, image_shape=(1, 12, 12), step=40)


def save_lora(path, **fields):
    modules = {"a": LoRAFactors(torch.ones(1, 3), torch.ones(2, 1), 2.0)}
    write_lora(LoRAFile(modules, base_hash="abc", config=CONFIG, step=7, **fields), path, "native")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# writing


def test_a_write_replaces_the_file_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in ("first", "second"):
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos"), KeyError("bug"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half_a_file(temporary):
        temporary.write_text("ne")
        raise error

    named = isinstance(error, (OSError, RuntimeError))
    with pytest.raises(CheckpointError if named else type(error), match=f"cannot write {path}: " if named else None):
        write_atomically(path, half_a_file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_reader_of_the_old_file_sees_no_half_written_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "folder").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*folder/model\.safetensors"):
        save_safetensors(tmp_path / "folder" / "model.safetensors", TENSORS, {})


def test_written_files_have_the_usual_rights(tmp_path):
    (tmp_path / "plain").touch()
    save_safetensors(tmp_path / "model.safetensors", TENSORS, {})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# reading


def test_a_model_comes_back_with_its_header(tmp_path):
    path = tmp_path / "diffusion-40.safetensors"
    save_model(
        path,
        TENSORS | {"view": torch.arange(12.0).view(3, 4).T, "trained": torch.nn.Parameter(torch.ones(2)).bfloat16()},
        config=CONFIG,
        image_shape=(1, 12, 12),
        step=40,
    )
    file = load_model_file(path)
    assert (file.path, file.config, file.image_shape, file.step) == (path, CONFIG, (1, 12, 12), 40)
    expected = {"view": torch.arange(12.0).view(3, 4).T, "trained": torch.ones(2, dtype=torch.bfloat16)}
    assert equal(file.tensors, TENSORS | expected)

    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    assert header["format"] == "xdiffusion-model"
    assert header["version"] == package_version() != ""


def test_a_lora_comes_back_with_its_header(tmp_path):
    save_lora(tmp_path / "lora.safetensors", metadata={"ss_note": "style", "format": "pt"})
    file = read_lora(tmp_path / "lora.safetensors")
    assert (file.format, file.base_hash, file.config, file.step) == ("native", "abc", CONFIG, 7)
    factors = file.modules["a"]
    assert (tuple(factors.lora_A.shape), tuple(factors.lora_B.shape)) == ((1, 3), (2, 1))
    assert (factors.lora_alpha, factors.use_rslora, factors.magnitude) == (2.0, False, None)
    header = load_safetensors(tmp_path / "lora.safetensors")[1]
    assert (header["format"], header["rank"], header["ss_note"]) == ("xdiffusion-lora", "1", "style")


@pytest.mark.parametrize("alphas", [{"a": 2.0, "b.c": 2.0}, {"a": 2.0, "b.c": 0.5}])
@pytest.mark.parametrize("rslora", [(False, False), (True, True), (False, True)])
def test_every_alpha_survives(alphas, rslora, tmp_path):
    modules = {
        name: LoRAFactors(torch.ones(2, 1), torch.ones(1, 2), alpha, use_rslora)
        for (name, alpha), use_rslora in zip(alphas.items(), rslora)
    }
    write_lora(LoRAFile(modules), tmp_path / "lora.safetensors", "native")
    file = read_lora(tmp_path / "lora.safetensors")
    assert {name: f.lora_alpha for name, f in file.modules.items()} == alphas
    assert tuple(f.use_rslora for f in file.modules.values()) == rslora
    assert (file.base_hash, file.config, file.step) == (None, None, 0)


def test_a_safetensors_file_without_a_header_of_ours(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    file = load_model_file(tmp_path / "model.safetensors")
    assert (file.config, file.image_shape, file.step) == (None, None, 0)
    assert equal(file.tensors, TENSORS)


@pytest.mark.parametrize("wrap", [dict, lambda t: {"state_dict": t, "step": 3}, lambda t: {"model": t}])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_a_pickled_state_dict(wrap, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.save(wrap(TENSORS), path)
    assert equal(load_model_file(path).tensors, TENSORS)


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"a": 1}, torch.ones(2), {"state_dict": {"a": "b"}}])
def test_a_pickle_without_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict of named tensors"):
        load_model_file(tmp_path / "model.pt")


class TouchesAFile:
    """Unpickled by the plain unpickler, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", ["torch", "torch legacy", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(save, tmp_path):
    path, made = tmp_path / "model.pt", tmp_path / "made"
    content = {"a": torch.ones(2), "b": TouchesAFile(made)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    torch.load(path, weights_only=False) if save != "pickle" else pickle.loads(path.read_bytes())
    assert made.exists()  # the content is as hostile as it should be
    made.unlink()
    for load in (load_pickled, load_model_file):
        with pytest.raises(CheckpointError, match="is not a torch file of plain weights"):
            load(path)
    assert not made.exists()


def test_kinds_are_told_apart(tmp_path):
    write_model(tmp_path / "model.safetensors")
    save_lora(tmp_path / "lora.safetensors")
    save_file({"to_q.lora_down.weight": torch.ones(1)}, tmp_path / "foreign.safetensors")
    for name in ("lora", "foreign"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is a LoRA, not a model: .* --lora_path"):
            load_model_file(tmp_path / f"{name}.safetensors")
    for name in ("model", "foreign"):
        with pytest.raises(CheckpointError, match=f"{name}.safetensors is not a LoRA file that is known here"):
            read_lora(tmp_path / f"{name}.safetensors")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list.pt is no list of pairs of factors"):
        read_lora(tmp_path / "list.pt")


def test_a_pt_name_stands_for_the_safetensors_file(tmp_path):
    write_model(tmp_path / "diffusion-40.safetensors")
    path, line = existing_weights(tmp_path / "diffusion-40.pt")
    assert path == tmp_path / "diffusion-40.safetensors"
    assert line == f"{tmp_path / 'diffusion-40.pt'} is not there; reading diffusion-40.safetensors beside it"
    assert load_model_file(tmp_path / "diffusion-40.pt").step == 40

    torch.save(TENSORS, tmp_path / "diffusion-40.pt")
    assert existing_weights(tmp_path / "diffusion-40.pt") == (tmp_path / "diffusion-40.pt", None)
    assert load_model_file(tmp_path / "diffusion-40.pt").config is None


def test_a_missing_file_is_named_with_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere/a\.pt$"):
        existing_weights(tmp_path / "nowhere" / "a.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at some/model .*; of a name on the hub nothing is fetched"):
        existing_weights(Path("some/model"))
    for step in (40, 80):
        write_model(tmp_path / f"diffusion-{step}.safetensors")
    with pytest.raises(CheckpointError, match=r"; there are: diffusion-40\.safetensors, diffusion-80\.safetensors$"):
        load_model_file(tmp_path / "diffusion-120.pt")
    with pytest.raises(CheckpointError, match=r"a folder, not a checkpoint; it holds: diffusion-40\.safetensors, diff"):
        existing_weights(tmp_path)
    for load in (load_safetensors, load_pickled):
        with pytest.raises(CheckpointError, match="no file at"):
            load(tmp_path / "a.pt")


# damage

READERS = {
    "model.safetensors": (write_model, (load_safetensors, load_model_file)),
    "lora.safetensors": (save_lora, (load_safetensors, read_lora)),
    "model.pt": (lambda path: torch.save(TENSORS, path), (load_pickled, load_model_file)),
    "legacy.pt": (
        lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
        (load_pickled, load_model_file),
    ),
}
ANY_BYTE = st.one_of(st.integers(0, 255), st.sampled_from([ord(c) for c in '0123456789"{}[],:.-eN']))
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), ANY_BYTE), min_size=1, max_size=4)


@pytest.mark.parametrize("name", READERS)
@given(edits=EDITS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_read_or_raise_the_one_error(name, edits, kept, tmp_path):
    write, readers = READERS[name]
    path = tmp_path / name
    write(path)
    content = bytearray(path.read_bytes())
    for place, byte in edits:
        content[int(place * len(content))] = byte
    path.write_bytes(content[: int(kept * len(content))])
    for read in readers:
        try:
            read(path)
        except CheckpointError as error:
            assert str(path) in str(error)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=64))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_raise_the_one_error(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for read in READERS[name][1]:
        with pytest.raises(CheckpointError):
            read(path)


@pytest.mark.parametrize("name", READERS)
def test_every_truncation_raises_the_one_error(name, tmp_path):
    write, readers = READERS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        for read in readers:
            with pytest.raises(CheckpointError):
                read(path)


def test_a_type_that_torch_does_not_have_is_an_error(tmp_path):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 3)
    with pytest.raises(CheckpointError, match=r"a\.safetensors (cannot be read|is not a whole)"):
        load_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", [{"config": "{"}, {"image_shape": "3"}, {"step": "many"}])
def test_a_damaged_header_is_named(header, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", TENSORS, header)
    with pytest.raises(CheckpointError, match="its header is damaged"):
        load_model_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("missing", ["config", "step", "lora_alpha"])
def test_a_lora_header_without_what_it_must_say(missing, tmp_path):
    header = {"format": "xdiffusion-lora", "config": "{}", "step": "1", "lora_alpha": "1.0"}
    del header[missing]
    factors = {"a.lora_A": torch.ones(1, 1), "a.lora_B": torch.ones(1, 1)}
    save_safetensors(tmp_path / "lora.safetensors", factors, header)
    with pytest.raises(CheckpointError, match=f"its header is damaged .*{missing}"):
        read_lora(tmp_path / "lora.safetensors")


# hash


def test_the_content_hash_sees_names_shapes_types_and_bits():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int32)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {"a": base["a"]},
        base | {"a": base["a"].view(3, 2)},
        base | {"b": base["b"].view(torch.float32)},
        base | {"a": torch.nextafter(base["a"], torch.tensor(9.0))},
        base | {"a": base["a"] * torch.tensor([1.0, 1.0, -0.0]).view(1, 3)},
    ]
    hashes = [content_hash(tensors) for tensors in (base, *others)]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 32 and int(h, 16) >= 0 for h in hashes)


def test_the_content_hash_does_not_see_order_layout_or_gradients():
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = content_hash({"a": weight, "b": torch.tensor(1.0)})
    assert content_hash({"b": torch.tensor(1.0), "a": weight}) == expected
    laid_out = torch.nn.Parameter(weight.to(memory_format=torch.channels_last))
    assert content_hash({"a": laid_out, "b": torch.tensor(1.0)}) == expected
    assert content_hash({"a": torch.zeros(2, dtype=torch.bfloat16)}) != content_hash({"a": torch.zeros(2).half()})


def test_the_content_hash_byte_by_byte():
    """LoRA files name their base by it: another way of hashing would orphan them."""
    text = b"a|torch.float32|(3,)|" + struct.pack("<3f", 0, 1, 2) + b"b|torch.int64|()|" + struct.pack("<q", -5)
    expected = hashlib.blake2b(text, digest_size=16).hexdigest()
    assert content_hash({"b": torch.tensor(-5), "a": torch.arange(3.0)}) == expected
