"""Configs as they are written: YAML files with their bases, `KEY=VALUE` overrides, headers of checkpoints.

A config may be a stranger's, so it is values and nothing else: no tags, no aliases, which multiply, and no `${...}`, which
reads the environment (docs/security.md). As they are written they are plain dicts; `config.resolve` makes an OmegaConf of them.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xdiffusion.places import nothing_at

MAX_BYTES = 2**16  # of a YAML file; the longest here has 2 kB
MAX_VALUES = 2_000  # of a config with its bases; ours have 70, and each takes a tenth of a millisecond and more
MAX_DEPTH = 16  # of sections in sections
SUFFIXES = (".yaml", ".yml")  # of a base: one that a stranger names is none of the files that hold passwords
LARGEST = 2**63  # no whole number is as large: torch's end there, and Python makes no float of one with 309 digits
MAX_FILES = 64  # that one file names under base:, and those under theirs


class ConfigError(ValueError):
    """A mistake in a config: what was found, where, and what is allowed."""


def assignment(key: str, value: Any) -> str:
    """KEY=VALUE as `--set` takes it; texts quoted, because YAML reads a bare `no` as false and a folder `2024` as a number.

    Raises:
        ConfigError: for a text that no YAML holds.
    """
    if isinstance(value, list):
        return f"{key}=[{', '.join(_quoted(key, item) for item in value)}]"
    return f"{key}={_quoted(key, value)}"


def _quoted(key: str, value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a letter, or what Python makes of bytes in another encoding
        raise ConfigError(f"{key} {value!a:.200} is no Unicode text") from error
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)  # JSON's emoji are no YAML
    return quoted.strip()


def load_yaml(path: str | Path, over: Callable[[str, dict, dict], dict[str, Any]] | None = None) -> dict[str, Any]:
    """One YAML file on top of the files it names under `base:`.

    Args:
        path: of the file.
        over: (source, below, above) -> above on top of below; default: `merge`.

    Raises:
        ConfigError: if a file is missing, is no YAML mapping, names itself, or holds more than values.
    """
    return reduce(partial(over or merge, str(path)), _layers(Path(path), (), [], count(1)), {})


def _layers(path: Path, readers: tuple[Path, ...], read: list[Path], values: Iterator[int]) -> list[dict]:
    """A file's bases and itself, in the order in which they are laid over each other.

    Args:
        readers: the files that led here.
        read: all that were read.
        values: counts those of all files.
    """
    read.append(path)
    place = _place(path)
    if place in readers:
        raise ConfigError(f"{path}: reads itself through base:")
    if len(read) > MAX_FILES:
        raise ConfigError(f"{read[0]} names more than {MAX_FILES} files through base:")
    try:
        own = OmegaConf.to_container(OmegaConf.load(io.StringIO(_plain_yaml(path, values))))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {one_line(error)}") from error
    check_values(own, str(path))
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, Sequence) or not all(isinstance(b, str) and b.endswith(SUFFIXES) for b in bases):
        raise ConfigError(f"{path}: base={bases!s:.200} must be the path of a .yaml file or a list of paths")
    here = (*readers, place)
    return [layer for base in bases for layer in _layers(path.parent / base, here, read, values)] + [own]


def _place(path: Path) -> Path:
    """Where a config file is, links followed.

    Raises:
        ConfigError: if there is none.
    """
    try:
        if path.is_file():
            return path.resolve()
        raise ConfigError(nothing_at(path, "config file", SUFFIXES))
    except OSError as error:  # a name that is too long
        raise ConfigError(f"no config file at {path!s:.200}: {error.strerror}") from error


def _plain_yaml(path: Path, values: Iterator[int]) -> str:
    """The text of a YAML file whose reading takes no more memory, time or stack than its size lets expect.

    Raises:
        ValueError, yaml.YAMLError, OSError: if it is none.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; allowed are {MAX_BYTES:,}")
    text, depth = path.read_text(encoding="utf-8"), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if not depth and isinstance(event, yaml.NodeEvent) and not isinstance(event, yaml.MappingStartEvent):
            raise ValueError("it must hold a mapping of sections")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor}: aliases are not read; use base:")
        if isinstance(event, yaml.NodeEvent) and next(values) > MAX_VALUES:
            raise ValueError(f"with its bases, it has more than {MAX_VALUES:,} values")
        if isinstance(event, yaml.ScalarEvent):
            check_values(event.value, f"line {event.start_mark.line + 1}")
    return text


def check_values(content: Any, source: str, key: str = "value", depth: int = 0) -> int:
    """See that a config's mappings and lists hold plain values, and count them.

    Raises:
        ConfigError: for `${...}`, which OmegaConf would replace by an environment variable or another value, for `???`,
            which it takes for no value, and for nesting, numbers or numbers of values without reason.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source}: {key[:40]} is nested more than {MAX_DEPTH} deep")
    if isinstance(content, str) and "${" in content:
        raise ConfigError(f"{source}: {key}={content[:80]!r}: a config holds values, nothing in it is replaced")
    if isinstance(content, str) and content == "???":
        raise ConfigError(f"{source}: {key}={content!r}: OmegaConf's sign of a missing value is none")
    if isinstance(content, int) and abs(content) >= LARGEST:
        shown = f"={content}" if abs(content) < 10**40 else ""  # Python does not print thousands of digits
        raise ConfigError(f"{source}: {key}{shown} must be between -2^63 and 2^63")
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    values = 1
    for name, value in pairs:
        values += check_values(value, source, f"{key}.{name}" if depth else str(name), depth + 1)
        if values > MAX_VALUES:
            raise ConfigError(f"{source}: {key[:40]} has more than {MAX_VALUES:,} values")
    return values


def merge(source: str, *configs: Mapping[str, Any]) -> dict[str, Any]:
    """Later configs on top of earlier ones, key by key, which stay as they are; `source` is named in errors.

    Raises:
        ConfigError: where a mapping would be laid over a list, or a list over a mapping.
    """
    return reduce(partial(_over, source, ""), configs, {})


def _over(source: str, where: str, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if {dict, list} == {type(old), type(value)}:
            kinds = ("a mapping", "a list") if isinstance(value, dict) else ("a list", "a mapping")
            raise ConfigError(f"{source}: {where}{key}={value!s:.80} is {kinds[0]}, and would be laid over {kinds[1]}")
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _over(source, f"{where}{key}.", old, value) if both else value
    return merged


def nested(key: str, value: Any) -> dict[str, Any]:
    """("a.b", 1) -> {"a": {"b": 1}}."""
    return reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """["a.b=c", ...] as a config; values are read as YAML.

    Raises:
        ConfigError: for an assignment without "=" or with an unreadable value.
    """
    overrides = OmegaConf.create()
    for assignment in assignments:
        if "=" not in assignment.lstrip("="):
            raise ConfigError(f"--set {assignment!r} must have the form KEY=VALUE, such as training.batch_size=64")
        try:
            overrides.merge_with_dotlist([assignment])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"--set {assignment!r:.200}: {one_line(error)}") from error
        check_values(OmegaConf.to_container(overrides), "--set")
    return OmegaConf.to_container(overrides)


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())
