"""Pickles read as data: values, containers, and tensors on storages that the file around them holds. Nothing is called.

A pickle is a program for a small stack machine, and Python's runs any function that it names. This machine knows the
operations that torch.save writes, in pickle's protocol 2; of names it knows those that tensors are rebuilt by. Names of
what a trainer leaves beside the weights are kept as `UnreadObject`, which is a name and no more, and any other is refused:
Stable Diffusion 1.x was published as checkpoints of pytorch-lightning, with its callback and numpy's numbers in them.

What a pickle says costs work, and its work is bounded: not the length of the file, but what comes of it counts.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_WORK = 1_000_000  # operations, and more for what costs more; Stable Diffusion's trainer state needs 300,000
MADE_WORK, TEXT_WORK = 10, 1 / 32  # of a name, a tensor or its storage; of a byte of text
LONGEST_NAME = 256
MAX_DIMENSIONS = 64  # torch's own limit, which its views do not see
HASH_MODULUS = 2**61 - 1  # of Python's numbers

STORAGES = {
    "torch.storage.UntypedStorage": torch.uint8, "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8,
    "torch.BoolStorage": torch.bool, "torch.ShortStorage": torch.int16, "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64,
}  # fmt: skip
DTYPES = {f"torch.{name}": getattr(torch, name) for name in (
    "uint8", "int8", "bool", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "float8_e4m3fn", "float8_e5m2",
)}  # fmt: skip
NUMPY_DTYPES = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool, "u1": torch.uint8, "i1": torch.int8,
    "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
}  # fmt: skip
LIBRARIES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.", "typing.")
BESIDE_WEIGHTS = {
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    *(f"builtins.{kind}" for kind in ("complex", "dict", "float", "int", "list", "long", "set", "str", "unicode")),
}


class UnreadObject:
    """A name in a pickle, or the object that it would have made: nothing but the name is left of either."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Parameters(dict):
    """What a `torch.nn.ParameterDict` held: early learned words lie in one."""


class NumpyObject(UnreadObject):
    """An array of numpy's, or its type. Tensors of a Mac's GPU were written as such, by torch before 2.1; no other is read."""

    __slots__ = ("code", "numbers")

    def __init__(self, name: str, code: str = ""):
        super().__init__(name)
        self.code, self.numbers = code, None

    def fill(self, state: Sequence[Any]) -> None:
        """With what numpy keeps of a type, the second of it its order of bytes, or of an array."""
        if self.code:
            self.code = self.code if state[1] in ("<", "|") else "of another machine"
            return
        _, shape, kind, columns_first, content = state
        if not columns_first and isinstance(content, bytes) and kind.code in NUMPY_DTYPES:
            dtype = NUMPY_DTYPES[kind.code]
            numbers = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self.numbers = numbers.reshape(shape)


class Unpickler:
    """Reads the pickles of a stream one after another.

    Args:
        stream: at the first of them.
        storage: (dtype, key, elements) -> (elements,): the numbers that tensors are parts of.

    Raises:
        ValueError: by `load`, for names and operations that no weights need, and for too much work; a damaged pickle
            makes any other exception.
    """

    def __init__(self, stream: BinaryIO, storage: Callable[[torch.dtype, str, int], Tensor]):
        self.stream = stream
        self.storage = storage
        self.left = float(MAX_WORK)
        self.operations: dict[bytes, Callable[[], None]] = {
            pickle.PROTO: partial(self._read, 1),
            pickle.NONE: lambda: self.stack.append(None),
            pickle.NEWTRUE: lambda: self.stack.append(True),
            pickle.NEWFALSE: lambda: self.stack.append(False),
            pickle.EMPTY_TUPLE: lambda: self.stack.append(()),
            pickle.EMPTY_LIST: lambda: self.stack.append([]),
            pickle.EMPTY_DICT: lambda: self.stack.append({}),
            pickle.BININT: lambda: self.stack.append(self._number("<i")),
            pickle.BININT1: lambda: self.stack.append(self._number("<B")),
            pickle.BININT2: lambda: self.stack.append(self._number("<H")),
            pickle.BINFLOAT: lambda: self.stack.append(self._number(">d")),
            pickle.LONG1: lambda: self.stack.append(int.from_bytes(self._read(self._number("<B")), "little", signed=True)),
            pickle.BINUNICODE: lambda: self.stack.append(self._text(self._number("<I"))),
            pickle.SHORT_BINSTRING: lambda: self.stack.append(self._text(self._number("<B"))),
            pickle.BINPUT: lambda: self._remember(self._number("<B")),
            pickle.LONG_BINPUT: lambda: self._remember(self._number("<I")),
            pickle.BINGET: lambda: self.stack.append(self.memo[self._number("<B")]),
            pickle.LONG_BINGET: lambda: self.stack.append(self.memo[self._number("<I")]),
            pickle.MARK: self._mark,
            pickle.TUPLE: lambda: self._join(self._since_mark()),
            pickle.TUPLE1: lambda: self._join(self._last(1)),
            pickle.TUPLE2: lambda: self._join(self._last(2)),
            pickle.TUPLE3: lambda: self._join(self._last(3)),
            pickle.APPEND: lambda: self._extend(self._last(1)),
            pickle.APPENDS: lambda: self._extend(self._since_mark()),
            pickle.SETITEM: lambda: self._set_items(self._last(2)),
            pickle.SETITEMS: lambda: self._set_items(self._since_mark()),
            pickle.GLOBAL: self._name,
            pickle.REDUCE: self._make,
            pickle.NEWOBJ: self._make,
            pickle.BUILD: self._build,
            pickle.BINPERSID: self._find_storage,
        }

    def load(self) -> Any:
        """The value of the next pickle."""
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        while (code := self._read(1)) != pickle.STOP:
            self._spend(1)
            if code not in self.operations:
                raise ValueError(
                    f"its pickle has the operation {code!r}, which torch.save does not write by default; save it again with "
                    "pickle_protocol=2, or as safetensors"
                )
            self.operations[code]()
        self.memo.clear()  # the operations are of a reader that they keep alive, and it would hold what was read
        return self.stack.pop()

    def _spend(self, work: float) -> None:
        self.left -= work
        if self.left < 0:
            raise ValueError(f"its pickle takes more than {MAX_WORK:,} operations")

    def _read(self, length: int) -> bytes:
        content = self.stream.read(length)
        if len(content) < length:
            raise ValueError("its pickle is cut")
        return content

    def _number(self, format: str) -> Any:
        return struct.unpack(format, self._read(struct.calcsize(format)))[0]

    def _text(self, length: int) -> str:
        self._spend(TEXT_WORK * length)
        return self._read(length).decode("utf-8", "replace")

    def _remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _last(self, count: int) -> list[Any]:
        items, self.stack[-count:] = self.stack[-count:], []
        if len(items) < count:
            raise ValueError("its pickle takes more than there is")
        return items

    def _join(self, items: Sequence[Any]) -> None:
        self.stack.append(tuple(items))

    def _extend(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, UnreadObject):
            raise ValueError(f"its pickle appends to a {type(target).__name__}")

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(zip(items[::2], items[1::2], strict=True)))
        elif not isinstance(target, UnreadObject):
            raise ValueError(f"its pickle sets items of a {type(target).__name__}")

    def _name(self) -> None:
        self._spend(MADE_WORK)
        module, name = (self.stream.readline(LONGEST_NAME).decode().rstrip("\n") for _ in range(2))
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        known = full in MAKERS or full in STORAGES or full in DTYPES or full in BESIDE_WEIGHTS
        if not known and not full.startswith(LIBRARIES):
            raise ValueError(f"it names {full}, which no weights need")
        self.stack.append(UnreadObject(full))

    def _make(self) -> None:
        made, arguments = self._last(2)
        if not isinstance(made, UnreadObject) or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls a {type(made).__name__}")
        if made.name not in MAKERS:
            self.stack.append(UnreadObject(made.name))
            return
        copied = len(arguments[0]) if made.name == "collections.OrderedDict" and arguments else 0
        copied += TEXT_WORK * len(arguments[0]) if made.name == "_codecs.encode" else 0
        self._spend(MADE_WORK + copied)
        self.stack.append(MAKERS[made.name](*arguments))

    def _build(self) -> None:
        target, state = self._last(2)
        if isinstance(target, Parameters):
            self._spend(len(state["_parameters"]))
            target.update(_pairs(state["_parameters"].items()))
        elif isinstance(target, NumpyObject):
            self._spend(TEXT_WORK * sum(len(part) for part in state if isinstance(part, bytes)))
            target.fill(state)
        self.stack.append(target)

    def _find_storage(self) -> None:
        what, kind, key, _, elements, *view = self.stack.pop()
        if what != "storage" or not isinstance(key, str) or not isinstance(elements, int) or view not in ([], [None]):
            raise ValueError("its pickle asks for something that is no storage")
        self._spend(MADE_WORK)
        self.stack.append(self.storage(STORAGES[kind.name], key, elements))


def _pairs(pairs: Any) -> dict[Any, Any]:
    """A dict with keys that are quick to compare: the hash of nested tuples can take for ever, and all multiples of
    HASH_MODULUS have the same."""
    made = {}
    for key, value in pairs:
        if not isinstance(key, str | int | float | None | UnreadObject):
            raise ValueError(f"its pickle has a {type(key).__name__} as a key")
        if isinstance(key, int) and abs(key) >= HASH_MODULUS:
            raise ValueError("its pickle has a number of more than 60 bits as a key")
        made[key] = value
    return made


# --- what the names of a pickle make ---


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A part of a storage; that it wants a gradient, and hooks, are forgotten."""
    if not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise ValueError(f"it holds a tensor of {len(size):,} sides and {len(stride):,} strides")
    return storage.as_strided(size, stride, offset)


def _tensor_of_dtype(storage: Tensor, *parts: Any) -> Tensor:
    """As `_tensor`, of a storage of bytes; after offset, size, stride, gradient and hooks comes the dtype."""
    return _tensor(storage.view(DTYPES[parts[5].name]), *parts)


def _of_type(made: UnreadObject, kind: UnreadObject, arguments: tuple, *_: Any) -> Tensor:
    """A tensor with attributes, which are forgotten."""
    if kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise ValueError(f"it holds a tensor of the type {kind.name}")
    return TENSORS[made.name](*arguments)


def _bytes(text: str, encoding: str = "utf-8") -> bytes | UnreadObject:
    """What protocol 2 has no other way to write."""
    return text.encode(encoding) if encoding == "latin1" else UnreadObject("_codecs.encode")


def _of_array(array: NumpyObject, dtype: UnreadObject, *_: Any) -> Tensor:
    """The numbers of an array of numpy's; on which device they were, and that they want a gradient, is forgotten."""
    if array.numbers is None or array.numbers.dtype != DTYPES[dtype.name]:
        raise ValueError(f"it holds a tensor of {dtype.name} in an array of numpy's that are not its numbers, in rows")
    return array.numbers


TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
}
MAKERS: dict[str, Callable[..., Any]] = TENSORS | {
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_device_tensor_from_numpy": _of_array,
    "numpy.dtype": lambda code, *_: NumpyObject("numpy.dtype", code),
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: NumpyObject("numpy.ndarray") for core in ("core", "_core")},
    "_codecs.encode": _bytes,
    "torch.Size": lambda sizes=(): sizes,
    "torch.nn.modules.container.ParameterDict": lambda *_: Parameters(),
    "collections.OrderedDict": lambda pairs=(): _pairs(pairs),
}
