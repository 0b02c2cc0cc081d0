"""The files of torch.save: read as they were, with no more than a name of what is beside the weights, and nothing is run."""

import io
import pickle
import struct
import sys
import types
from collections import OrderedDict

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from tiny import equal_bits

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.pickles import UnreadObject
from xdiffusion.checkpoints.reading import load_pickled


@pytest.fixture
def lightning(monkeypatch):
    """The class that Stable Diffusion's own checkpoints name, of a library that is not installed here."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for i in range(1, 4):
        package = ".".join(name.split(".")[:i])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = made
    yield made


def trainers_checkpoint(callback):
    """As pytorch-lightning 1.4 wrote Stable Diffusion 1.4, with its settings and an object of the callback besides."""
    used = callback()
    used.best = numpy.float64(0.5)
    return {
        "epoch": 4,
        "global_step": numpy.int64(470_000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {
            "model.weight": torch.arange(6.0).reshape(2, 3),
            "model.bias": torch.ones(2, dtype=torch.float16),
        },
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(1.0), "used": used}},
        "optimizer_states": [],
        "hyper_parameters": OmegaConf.create({"base": {"rate": 1e-4, "channels": [1, 2]}}),
        "best": [numpy.float64(0.25), numpy.arange(3)],
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_the_weights_of_a_trainers_checkpoint_are_read(lightning, mmap, tmp_path):
    content = trainers_checkpoint(lightning)
    torch.save(content, tmp_path / "sd.ckpt")
    for module in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[module]  # where it is read it is not there
    read = load_pickled(tmp_path / "sd.ckpt", mmap=mmap)
    assert equal_bits(read["state_dict"], content["state_dict"])
    assert (read["epoch"], read["pytorch-lightning_version"]) == (4, "1.4.2")
    (callback,) = read["callbacks"]
    assert callback.name == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert isinstance(read["global_step"], UnreadObject) and isinstance(read["hyper_parameters"], UnreadObject)
    assert all(isinstance(value, UnreadObject) for value in read["best"])
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    tensors = load_model_file(tmp_path / "sd.ckpt").tensors
    assert equal_bits({name: tensors[name] for name in content["state_dict"]}, content["state_dict"])


def test_early_learned_words_are_read(tmp_path):
    """As the paper's own code saved them: in a ParameterDict."""
    rows = torch.nn.Parameter(torch.randn(2, 8))
    parameters = torch.nn.ParameterDict({"*": rows})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "cat.pt")
    assert equal_bits(read_learned_tokens(tmp_path / "cat.pt"), {"cat": rows.detach()})


# --- as they were ---


def attributed():
    tensor = torch.ones(2)
    tensor.note = "kept by torch"
    return tensor


CONTENTS = {
    "numbers": lambda: {"a": 1, "b": -70_000, "c": 2**70, "d": 0.1, "e": True, "f": None, "g": "é" * 300, 3: (1, (2,), [])},
    "ordered": lambda: OrderedDict([("b", torch.ones(1)), ("a", torch.Size([1, 2]))]),
    "types": lambda: {str(t): torch.arange(-2, 3).to(t) for t in (torch.int8, torch.int16, torch.bool, torch.bfloat16)},
    "new types": lambda: [torch.arange(5).to(t) for t in (torch.uint16, torch.float8_e4m3fn, torch.uint64)],
    "strides": lambda: [torch.arange(24.0).view(2, 3, 4).transpose(0, 2), torch.arange(9)[2:7:2], torch.ones(())],
    "parameters": lambda: [torch.nn.Parameter(torch.randn(2, 2)), attributed(), torch.ones(0, 3)],
}  # fmt: skip
FORMS = {"zip": {}, "mapped": {}, "before 1.6": {"_use_new_zipfile_serialization": False}}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_torch_saves_is_read_as_it_was(content, form, tmp_path):
    saved = content()
    torch.save(saved, tmp_path / "a.pt", **FORMS[form])
    assert same(load_pickled(tmp_path / "a.pt", mmap=form == "mapped"), saved)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_share_their_numbers_still_do(form, tmp_path):
    whole = torch.arange(6.0)
    torch.save({"whole": whole, "part": whole[2:4], "again": whole}, tmp_path / "a.pt", **FORMS[form])
    read = load_pickled(tmp_path / "a.pt", mmap=form == "mapped")
    read["whole"][2] = 9
    assert read["part"].tolist() == [9, 3] and read["again"] is read["whole"]
    assert torch.load(tmp_path / "a.pt", weights_only=True)["whole"][2] == 2  # the file is as it was


def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path):
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(struct.pack("<2f", 500, 501))] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        load_pickled(tmp_path / "a.pt")


# --- what no weights need ---


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def name(full: str) -> bytes:
    module, _, own = full.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{own}\n".encode()


def call(full: str, *arguments: bytes) -> bytes:
    return name(full) + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def write_around(content: bytes, form: str, path) -> None:
    """A file of torch's whose pickle computes {"value": CONTENT}."""
    torch.save({}, path, **FORMS[form])
    content = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + text("value") + content + pickle.SETITEM + pickle.STOP
    if form == "before 1.6":
        stream = io.BytesIO(path.read_bytes())
        for _ in range(3):
            pickle.load(stream)
        path.write_bytes(stream.getvalue()[: stream.tell()] + content + pickle.dumps([], 2))
        return
    reader = torch._C.PyTorchFileReader(str(path))
    names = [record for record in reader.get_all_records() if not record.startswith(".data")]
    records = {record: reader.get_record(record) for record in names}
    writer = torch._C.PyTorchFileWriter(str(path))
    for record, data in (records | {"data.pkl": content}).items():
        writer.write_record(record, data, len(data))
    writer.write_end_of_file()


@pytest.mark.parametrize("form", ["zip", "before 1.6"])
@pytest.mark.parametrize(
    "called",
    ["os.system", "builtins.eval", "numpyx.load", "argparse.ArgumentParser", "lightningx.run", "builtins.bytearray",
     "__builtin__.bytearray", "torch._utils._rebuild_sparse_tensor", "torch.serialization.load"],
)  # fmt: skip
def test_any_other_name_is_refused(called, form, tmp_path):
    write_around(call(called, text("exit 1")), form, tmp_path / "bad.ckpt")
    full = called.replace("__builtin__", "builtins")
    with pytest.raises(CheckpointError, match=rf"bad\.ckpt is not a torch file of plain weights: it names {full}"):
        load_pickled(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    "called", ["numpy.load", "numpy.f2py.compile", "pytorch_lightning.run", "typing.get_type_hints", "_codecs.encode"]
)
def test_a_function_of_such_a_library_is_not_called(called, tmp_path):
    """Whatever it is called: the name alone is taken."""
    write_around(call(called, text("made")), "zip", tmp_path / "sd.ckpt")
    value = load_pickled(tmp_path / "sd.ckpt")["value"]
    assert isinstance(value, UnreadObject) and value.name == called


def doubled(levels: int) -> bytes:
    """((..., ...), ...): a tuple that takes 2**levels steps to look through."""
    put, get = pickle.BINPUT + b"\0", pickle.BINGET + b"\0"
    return pickle.EMPTY_TUPLE + (put + get + pickle.TUPLE2) * levels


def hexed(levels: int) -> bytes:
    """Each level would be twice as long as the one inside it."""
    content = text("A" * 1000)
    for _ in range(levels):
        content = call("_codecs.encode", content, text("hex"))
    return content


def storage(key: bytes, elements: int) -> bytes:
    size = pickle.BININT + struct.pack("<i", elements)
    parts = text("storage") + name("torch.FloatStorage") + key + text("cpu") + size
    return pickle.MARK + parts + pickle.TUPLE + pickle.BINPERSID


def tensor(size: bytes, length: int = 0) -> bytes:
    zero = pickle.BININT1 + b"\0"
    return call("torch._utils._rebuild_tensor_v2", storage(text("0"), length), zero, size, size)


def arrays(count: int) -> bytes:
    """So many arrays of numpy's with the same 100 kB."""
    zero, content = pickle.BININT1 + b"\0", call("_codecs.encode", text("A" * 100_000), text("latin1")) + pickle.BINPUT + b"\1"
    kind = call("numpy.dtype", text("f4")) + pickle.BINPUT + b"\2"
    made = name("numpy.core.multiarray._reconstruct") + pickle.EMPTY_TUPLE + pickle.REDUCE
    shape = pickle.BININT + struct.pack("<i", 25_000) + pickle.TUPLE1
    state = pickle.MARK + zero + shape + pickle.BINGET + b"\2" + pickle.NEWFALSE + pickle.BINGET + b"\1" + pickle.TUPLE
    return content + kind + (made + state + pickle.BUILD) * count


ATTACKS = {
    "arrays without end": arrays(10_000),
    "bytes without end": text("A" * 100_000) + pickle.BINPUT + b"\1"
    + (name("_codecs.encode") + pickle.BINGET + b"\1" + text("latin1") + pickle.TUPLE2 + pickle.REDUCE) * 10_000,
    "a key without end": pickle.EMPTY_DICT + doubled(60) + text("v") + pickle.SETITEM,
    "keys of pairs without end": call("collections.OrderedDict", pickle.EMPTY_LIST + doubled(60) + text("v")
    + pickle.TUPLE2 + pickle.APPEND),
    "parameters without end": name("torch.nn.modules.container.ParameterDict") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    + pickle.EMPTY_DICT + text("_parameters") + pickle.EMPTY_LIST + doubled(60) + text("v") + pickle.TUPLE2 + pickle.APPEND
    + pickle.SETITEM + pickle.BUILD,
    "a storage's key without end": storage(doubled(60), 1),
    "a shape without end": tensor(doubled(60)),
    "a value without end": doubled(60),
    "depth": pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999,
    "codecs in codecs": hexed(20),
    "a storage of 8 GB": tensor(pickle.BININT + struct.pack("<i", 2_000_000_000) + pickle.TUPLE1, 2_000_000_000),
    "operations without end": pickle.NONE * 2_000_000 + pickle.NONE,
    "names without end": b"".join(name(f"numpy.a{i}") for i in range(300_000)) * 4,
    "copies without end": call("collections.OrderedDict", pickle.EMPTY_LIST + pickle.BINPUT + b"\1" + pickle.MARK
    + (text("k") + pickle.NONE + pickle.TUPLE2) * 10_000 + pickle.APPENDS)
    + (name("collections.OrderedDict") + pickle.BINGET + b"\1" + pickle.TUPLE1 + pickle.REDUCE) * 10_000,
    "a text that says it has 4 GB": pickle.BINUNICODE + b"\xff" * 4,
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "before 1.6"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_comes_of_a_pickle_is_bounded(attack, form, tmp_path, no_hang):
    write_around(attack, form, tmp_path / "a.pt")
    try:
        load_pickled(tmp_path / "a.pt")
    except CheckpointError as error:
        assert str(tmp_path / "a.pt") in str(error)
    else:
        assert attack == ATTACKS["codecs in codecs"]
