"""Signatures read from source text, against what Python itself says of the same objects."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest

from xdiffusion.lora.layers import DEFAULT_ADAPTER
from xdiffusion.signatures import REQUIRED, accepts, describe, signature

Mode = Literal["fast", "slow"]
STRENGTH = 0.5


class WithInit:
    field: int = 3  # no parameter

    def __init__(self, first: int, second: float = 1e-3, *, mode: Mode = "fast", name: str = DEFAULT_ADAPTER):
        self.first = first

    def other(self, unrelated: int = 1):
        return unrelated


@dataclass(frozen=True)
class AsDataclass:
    required: int
    sizes: Sequence[int] = (1, 2)
    strength: float | None = None

    def method(self, unrelated: int) -> int:
        return unrelated


def as_function(positional, /, x: int, y: float = STRENGTH, *, z: list[int], flag: bool = False, low: float = -2.5):
    return positional, x, y, z, flag, low


def read(name: str) -> dict:
    return dict(signature(f"tests.test_signatures:{name}"))


@pytest.mark.parametrize("target", [WithInit, AsDataclass, as_function])
def test_names_order_and_defaults_are_those_of_inspect(target):
    expected = {
        name: REQUIRED if p.default is inspect.Parameter.empty else p.default
        for name, p in inspect.signature(target).parameters.items()
    }
    found = {name: p.default for name, p in read(target.__name__).items()}
    assert list(found) == list(expected)
    assert found == {name: list(d) if isinstance(d, tuple) else d for name, d in expected.items()}  # lists, as in YAML


def test_aliases_are_looked_up_where_they_are_assigned():
    parameters = read("WithInit")
    assert describe(parameters["mode"].annotation) == "one of fast, slow"
    assert parameters["name"].default == DEFAULT_ADAPTER  # imported from another module of the package
    assert read("as_function")["y"].default == STRENGTH


def test_a_name_that_is_not_there():
    with pytest.raises(LookupError, match=r"tests\.test_signatures defines no Nothing"):
        signature("tests.test_signatures:Nothing")


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    ("annotation", "taken", "refused"),
    [
        ("int", [0, -3], [True, 1.0, "1", None, [1]]),
        ("float", [0.5, 2, float("inf")], [True, "2", None]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("str", ["", "x"], [1, None, ["x"]]),
        ("int | None", [1, None], [True, 1.5, "x"]),
        ("str | Sequence[str]", ["a", ["a", "b"], []], [1, [1], ["a", None]]),
        ("Sequence[int]", [[1, 2], (1,), []], [1, "12", [1.0], [True], {"a": 1}]),
        ("list[float]", [[1, 2.5]], ["x", [False]]),
        ("tuple[int, ...]", [[], [1, 2, 3]], [[1, "2"]]),
        ("tuple[float, float]", [[0.9, 1]], [[0.9], [1, 2, 3], 0.9, ["a", "b"]]),
        ("Sequence[Sequence[int]]", [[[1], []]], [[1], [["a"]]]),
        ("Mapping[str, int] | None", [{}, {"a": 1}, None], [{"a": 1.5}, {1: 1}, [1], "a"]),
        ("dict[str, float]", [{"a": 1, "b": 0.5}], [{"a": "x"}, None]),
        ('Literal["a", "b"]', ["a", "b"], ["c", "", None, ["a"], False]),
        ("Literal[1]", [1], [2, "1"]),
        ("SomeClass", ["anything", 1, None], []),  # nothing that YAML can hold is compared with it
    ],
)
def test_accepts(annotation, taken, refused):
    assert [v for v in taken if not accepts(expression(annotation), v)] == []
    assert [v for v in refused if accepts(expression(annotation), v)] == []


def test_everything_fits_where_nothing_is_annotated():
    assert accepts(None, object())


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        ("int", "a whole number"),
        ("int | None", "a whole number or null"),
        ('Literal["no", "fp16"]', "one of no, fp16"),
        ('Literal["only"]', "one of only"),
        ("Sequence[int]", "a list of int"),
        ("tuple[float, float]", "a list of float, float"),
        ("tuple[int, ...]", "a list of int"),
        ("Mapping[str, int] | None", "a mapping of str to int or null"),
        ("str | Sequence[str]", "text or a list of str"),
    ],
)
def test_describe(annotation, text):
    assert describe(expression(annotation)) == text
