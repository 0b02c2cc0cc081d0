"""Checkpoints as trainers wrote them: the weights are read, what is beside them is empty, and nothing is run."""

import pickle
import struct
import sys
import types

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from tiny import equal_bits

from xdiffusion.checkpoints.files import CheckpointError, load_pickled
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.trainer_objects import Nothing


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
    assert issubclass(callback, Nothing) and callback is not lightning
    assert isinstance(read["global_step"], Nothing) and isinstance(read["hyper_parameters"], Nothing)
    assert all(isinstance(value, Nothing) and not vars(value) for value in read["best"])
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    tensors = load_model_file(tmp_path / "sd.ckpt").tensors
    assert equal_bits({name: tensors[name] for name in content["state_dict"]}, content["state_dict"])


def test_early_learned_words_are_read(tmp_path):
    """As the paper's own code saved them: in a ParameterDict."""
    rows = torch.nn.Parameter(torch.randn(2, 8))
    parameters = torch.nn.ParameterDict({"*": rows})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "cat.pt")
    assert equal_bits(read_learned_tokens(tmp_path / "cat.pt"), {"cat": rows.detach()})


def test_the_reader_leaves_no_name_behind(lightning, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(trainers_checkpoint(lightning), tmp_path / "sd.ckpt")
    load_pickled(tmp_path / "sd.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before


def archive_of(content, path):
    """A file of torch's with that pickle."""
    torch.save({}, path)
    reader = torch._C.PyTorchFileReader(str(path))
    records = {
        record: reader.get_record(record) for record in reader.get_all_records() if not record.startswith(".data")
    }
    writer = torch._C.PyTorchFileWriter(str(path))
    for record, data in (records | {"data.pkl": content}).items():
        writer.write_record(record, data, len(data))
    writer.write_end_of_file()


def archive_that_calls(name, argument, path):
    """A file of torch's whose content is {"value": NAME(ARGUMENT)}, whether the name exists or not."""

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    module, _, own = name.rpartition(".")
    called = pickle.GLOBAL + f"{module}\n{own}\n".encode() + text(argument) + pickle.TUPLE1 + pickle.REDUCE
    content = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + text("value") + called + pickle.SETITEM + pickle.STOP
    archive_of(content, path)


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "numpyx.load", "argparse.ArgumentParser", "lightningx.run"]
)
def test_any_other_name_is_refused(name, tmp_path):
    archive_that_calls(name, "exit 1", tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="is not a torch file of plain weights"):
        load_pickled(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("name", ["numpy.load", "numpy.f2py.compile", "pytorch_lightning.run", "typing.get_type_hints"])
def test_a_function_of_such_a_library_is_not_called(name, tmp_path):
    """Whatever it is called: the name alone is taken."""
    archive_that_calls(name, "made", tmp_path / "sd.ckpt")
    value = load_pickled(tmp_path / "sd.ckpt")["value"]
    assert isinstance(value, Nothing) and type(value).__name__ == name.rpartition(".")[2]


def test_names_without_end_are_refused_at_once(tmp_path):
    """torch would look through all of them at each one: 2,000 took 1.4 seconds."""
    names = b"".join(f"cnumpy\na{i}\n".encode() for i in range(2000))
    archive_of(pickle.PROTO + b"\2" + names + pickle.STOP, tmp_path / "many.ckpt")
    with pytest.raises(CheckpointError, match="it names 2000 objects of trainers; allowed are 100"):
        load_pickled(tmp_path / "many.ckpt")


@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_memory_that_a_pickle_asks_for_is_refused(module, tmp_path):
    """torch allows the name, with any size."""
    content = f"c{module}\nbytearray\n".encode() + pickle.BININT + struct.pack("<i", 300_000_000) + pickle.TUPLE1
    archive_of(pickle.PROTO + b"\2" + content + pickle.REDUCE + pickle.STOP, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="it asks for memory"):
        load_pickled(tmp_path / "a.ckpt")
