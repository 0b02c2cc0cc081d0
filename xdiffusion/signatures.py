"""Signatures read from source text: the schema of a config slot is the constructor's own signature.

A target such as "xdiffusion.networks.unet:UNet" is parsed, not imported, so a whole config is checked before torch is
loaded and a misspelt key answers at once.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
REQUIRED = object()
_SCALARS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_IN_WORDS = {"None": "null", "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_SEQUENCES = ("Sequence", "tuple", "list")
_MAPPINGS = ("Mapping", "dict")


@dataclass(frozen=True)
class Parameter:
    """One keyword of a target: its name, its annotation as an expression, and its default or REQUIRED."""

    name: str
    annotation: ast.expr | None
    default: Any


@cache
def signature(target: str) -> Mapping[str, Parameter]:
    """The parameters of a class's __init__, a dataclass's fields, or a function, by name and in order.

    Args:
        target: "package.module:Name", inside this package.

    Raises:
        LookupError: if the module defines no such class or function.
    """
    module_name, name = target.split(":")
    module = _parse(module_name)
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _function_parameters(node, module)
        if isinstance(node, ast.ClassDef) and node.name == name:
            init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            return _function_parameters(init, module) if init else _dataclass_fields(node, module)
    raise LookupError(f"{module_name} defines no {name}")


def accepts(annotation: ast.expr | None, value: Any) -> bool:
    """Whether a YAML value fits an annotation; True for an annotation that no YAML value can be compared with."""
    if annotation is None:
        return True
    if isinstance(annotation, ast.BinOp):  # X | Y
        return accepts(annotation.left, value) or accepts(annotation.right, value)
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return value is None
    if isinstance(annotation, ast.Name) and annotation.id in _SCALARS:
        is_bool = isinstance(value, bool)
        return isinstance(value, _SCALARS[annotation.id]) and (annotation.id == "bool") == is_bool
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        if annotation.value.id == "Literal":
            return value in _literals(annotation)
        if annotation.value.id in _SEQUENCES:
            items = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return isinstance(value, (list, tuple)) and _items_fit(items, value)
        if annotation.value.id in _MAPPINGS:
            of_key, of_value = annotation.slice.elts
            return isinstance(value, dict) and all(accepts(of_key, k) and accepts(of_value, v) for k, v in value.items())
    return True


def describe(annotation: ast.expr | None) -> str:
    """The annotation as a user of YAML reads it."""
    if isinstance(annotation, ast.BinOp):
        return f"{describe(annotation.left)} or {describe(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        kind = getattr(annotation.value, "id", "")
        if kind == "Literal":
            return "one of " + ", ".join(map(str, _literals(annotation)))
        if kind in _SEQUENCES:
            return "a list of " + ast.unparse(annotation.slice).strip("()").replace(", ...", "")
        if kind in _MAPPINGS:
            return "a mapping of {} to {}".format(*map(ast.unparse, annotation.slice.elts))
    text = "None" if annotation is None else ast.unparse(annotation)
    return _IN_WORDS.get(text, text)


@cache
def _parse(module_name: str) -> ast.Module:
    path = PACKAGE_ROOT.joinpath(*module_name.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _function_parameters(node: ast.FunctionDef, module: ast.Module) -> dict[str, Parameter]:
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [REQUIRED] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    keyword_only = zip(node.args.kwonlyargs, [REQUIRED if d is None else d for d in node.args.kw_defaults])
    pairs = [*zip(positional, defaults), *keyword_only]
    return {a.arg: _parameter(a.arg, a.annotation, d, module) for a, d in pairs if a.arg not in ("self", "cls")}


def _dataclass_fields(node: ast.ClassDef, module: ast.Module) -> dict[str, Parameter]:
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    return {
        f.target.id: _parameter(f.target.id, f.annotation, REQUIRED if f.value is None else f.value, module) for f in fields
    }


def _parameter(name: str, annotation: ast.expr | None, default: Any, module: ast.Module) -> Parameter:
    value = default if default is REQUIRED else _default_value(default, module)
    return Parameter(name, _resolve_alias(annotation, module), value)


def _default_value(node: ast.expr, module: ast.Module) -> Any:
    """A literal default, or a module constant such as DEFAULT_ADAPTER."""
    resolved = _resolve_alias(node, module)
    value = ast.literal_eval(resolved)
    return list(value) if isinstance(value, tuple) else value


def _resolve_alias(node: ast.expr | None, module: ast.Module) -> ast.expr | None:
    """A bare name that this package's modules assign is replaced by what is assigned."""
    if not isinstance(node, ast.Name) or node.id in _SCALARS:
        return node
    for statement in module.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == node.id:
            return statement.value
        ours = isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("xdiffusion")
        if ours and any(alias.name == node.id for alias in statement.names):
            return _resolve_alias(node, _parse(statement.module))
    return node


def _literals(annotation: ast.Subscript) -> list[Any]:
    value = ast.literal_eval(annotation.slice)
    return list(value) if isinstance(value, tuple) else [value]


def _items_fit(items: list[ast.expr], value: list) -> bool:
    variadic = len(items) == 1 or (isinstance(items[-1], ast.Constant) and items[-1].value is ...)
    if variadic:
        return all(accepts(items[0], v) for v in value)
    return len(items) == len(value) and all(accepts(i, v) for i, v in zip(items, value))
