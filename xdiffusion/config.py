"""YAML -> a checked, frozen config.

A file may name other files under `base:` (read first, relative to it). Overrides come on top: `--set a.b=c` and the flags
of the command line take the same road. Then every key is checked against a schema: unknown (with the nearest match),
missing, or of the wrong type is an error, before any weight is made; and every default is written out, so that the
resolved config in a checkpoint stays true when a default changes.

A config may be a stranger's, so it is values and nothing else: no tags, no aliases, which multiply, and no `${...}`, which
reads the environment (docs/security.md).
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xdiffusion.signatures import REQUIRED, Parameter, accepts, describe, signature

MAX_BYTES = 2**16  # of a YAML file; the longest here has 2 kB
MAX_VALUES = 2_000  # of a config with its bases; ours have 70, and each takes a tenth of a millisecond and more
MAX_DEPTH = 16  # of sections in sections
MAX_FILES = 64  # that one file names under base:, and those under theirs


class ConfigError(ValueError):
    """A mistake in a config: what was found, where, and what is allowed."""


@dataclass(frozen=True)
class Section:
    """Keys that are the keywords of one target, and sub-sections.

    Args:
        target: "package.module:Name" whose signature is the schema; None for a section of sub-sections only.
        injected: keywords that the program fills in and a YAML may not.
        children: sub-sections and slots by key.
        extra: keys of the section itself beside the target's, by name.
        optional: whether the section may be left out.
    """

    target: str | None = None
    injected: frozenset[str] = frozenset()
    children: Mapping[str, Section | Slot | Overlay] = field(default_factory=dict)
    extra: Mapping[str, Parameter] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Slot:
    """`{kind: name, ...}`: the kind picks the target, whose keywords are the other keys.

    Args:
        kinds: target by kind.
        injected: keywords that the program fills in and a YAML may not.
        extra: keys of the slot itself beside the target's, by name.
        default: kind where the slot is left out; None means it must be given.
        suffix: a suffix that any kind may carry (`_inverted`).
    """

    kinds: Mapping[str, str]
    injected: frozenset[str] = frozenset()
    extra: Mapping[str, Parameter] = field(default_factory=dict)
    default: str | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Overlay:
    """A partial copy of another top-level section, laid over it in some runs: its keys are checked, none is filled in."""

    section: str


Schema = Mapping[str, Section | Slot]


def load_yaml(path: str | Path) -> DictConfig:
    """One YAML file on top of the files it names under `base:`.

    Raises:
        ConfigError: if a file is missing, is no YAML mapping, names itself, or holds more than values.
    """
    return merge(str(path), *_layers(Path(path), (), [], count(1)))


def _layers(path: Path, readers: tuple[Path, ...], read: list[Path], values: Iterator[int]) -> list[DictConfig]:
    """A file's bases and itself, in the order in which they are laid over each other.

    Args:
        readers: the files that led here.
        read: all that were read.
        values: counts those of all files.
    """
    read.append(path)
    if path.resolve() in readers:
        raise ConfigError(f"{path}: reads itself through base:")
    if len(read) > MAX_FILES:
        raise ConfigError(f"{read[0]} names more than {MAX_FILES} files through base:")
    if not path.is_file():
        raise ConfigError(f"no config file at {path}")
    try:
        own = OmegaConf.load(io.StringIO(_plain_yaml(path, values)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {_one_line(error)}") from error
    if not isinstance(own, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(own).__name__}")
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, Sequence) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases} must be the path of a YAML file or a list of paths")
    here = (*readers, path.resolve())
    return [layer for base in bases for layer in _layers(path.parent / base, here, read, values)] + [own]


def _plain_yaml(path: Path, values: Iterator[int]) -> str:
    """The text of a YAML file whose reading takes no more memory, time or stack than its size lets expect.

    Raises:
        ValueError, yaml.YAMLError, OSError: if it is none.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; allowed are {MAX_BYTES:,}")
    text, depth = path.read_text(encoding="utf-8"), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
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
        ConfigError: for `${...}`, which OmegaConf would replace by an environment variable or another value, and for
            nesting or numbers of values without reason.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source}: {key[:40]} is nested more than {MAX_DEPTH} deep")
    if isinstance(content, str) and "${" in content:
        raise ConfigError(f"{source}: {key}={content[:80]!r}: a config holds values, nothing in it is replaced")
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    values = 1
    for name, value in pairs:
        values += check_values(value, source, f"{key}.{name}" if depth else str(name), depth + 1)
        if values > MAX_VALUES:
            raise ConfigError(f"{source}: {key[:40]} has more than {MAX_VALUES:,} values")
    return values


def from_mapping(content: Mapping[str, Any], source: str) -> DictConfig:
    """A config from the mapping that a checkpoint's header holds.

    Raises:
        ConfigError: if it holds more than values.
    """
    check_values(content, source)
    try:
        return OmegaConf.create(dict(content))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error


def without_unknown(content: Mapping[str, Any], schema: Schema, sections: Sequence[str]) -> dict[str, Any]:
    """What a file's header says, without what these sections of the schema do not know.

    They are a record of how the file was made, which may have been by another version; nothing is read from them.
    """
    known = {key: value for key, value in content.items() if key not in sections}
    for key in sections:
        section, given = schema[key], content.get(key)
        if isinstance(given, Mapping) and isinstance(section, Section) and section.target:
            known[key] = {name: value for name, value in given.items() if name in signature(section.target)}
    return known


def merge(source: str, *configs: DictConfig) -> DictConfig:
    """Later configs on top of earlier ones; `source` is named in errors.

    Raises:
        ConfigError: where a mapping would be laid over a list, or a list over a mapping.
    """
    try:
        return OmegaConf.merge(*configs)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error


def parse_overrides(assignments: Sequence[str]) -> DictConfig:
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
            raise ConfigError(f"--set {assignment!r:.200}: {_one_line(error)}") from error
        check_values(OmegaConf.to_container(overrides), "--set")
    return overrides


def with_overrides(config: DictConfig, overrides: DictConfig, schema: Schema) -> DictConfig:
    """overrides on top of config; where they change a slot's kind, keys that the new kind does not have are dropped."""
    merged = OmegaConf.create(OmegaConf.to_container(config))
    for path, slot in _slots(schema):
        kind, given = _at(overrides, f"{path}.kind"), _at(merged, path)
        if isinstance(given, DictConfig) and kind not in (None, given.get("kind")):
            target = slot.kinds.get(str(kind).removesuffix(slot.suffix))
            kept = {*signature(target), *slot.extra} if target else set(given)
            OmegaConf.update(merged, path, {k: v for k, v in given.items() if k in kept}, merge=False)
    return merge(f"the overrides {overrides}", merged, overrides)


def _at(config: DictConfig, path: str) -> Any:
    """The value at a dotted path; None where a section on the way is none, which `resolve` will say (omegaconf raises)."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, DictConfig) else None
    return value


def _slots(children: Mapping[str, Section | Slot | Overlay], where: str = "") -> Iterator[tuple[str, Slot]]:
    for key, child in children.items():
        if isinstance(child, Slot):
            yield f"{where}{key}", child
        elif isinstance(child, Section):
            yield from _slots(child.children, f"{where}{key}.")


def resolve(config: DictConfig, schema: Schema, source: str) -> DictConfig:
    """Check every key against the schema and write out every default.

    Args:
        config: what the files and the overrides say.
        schema: the allowed sections.
        source: named in errors (the path of the file).

    Returns:
        A read-only config.

    Raises:
        ConfigError: naming the key, its value, and what is allowed.
    """
    try:
        plain = OmegaConf.to_container(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error
    try:
        resolved = _resolve_section(plain, Section(children=schema), "", schema)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    frozen = OmegaConf.create(resolved)
    OmegaConf.set_readonly(frozen, True)
    return frozen


def _resolve_section(given: Any, section: Section, where: str, schema: Schema) -> dict[str, Any]:
    given = _mapping(given, where)
    parameters = {k: p for k, p in _signature(section.target).items() if k not in section.injected}
    parameters |= section.extra
    _check_known(given, [*parameters, *section.children], where)
    resolved = _resolve_parameters(given, parameters, where)
    for key, child in section.children.items():
        path = f"{where}{key}"
        if isinstance(child, Overlay):
            if key in given:
                resolved[key] = _check_overlay(given[key], schema[child.section], f"{path}.")
        elif isinstance(child, Slot):
            resolved[key] = _resolve_slot(given.get(key), child, f"{path}.")
        elif key in given or not child.optional:
            resolved[key] = _resolve_section(given.get(key, {}), child, f"{path}.", schema)
    return resolved


def _resolve_slot(given: Any, slot: Slot, where: str) -> dict[str, Any]:
    given = {"kind": slot.default} if given is None else _mapping(given, where)
    kind = given.get("kind", slot.default)
    if kind is None:
        raise ConfigError(f"{where}kind is missing; allowed: {', '.join(slot.kinds)}")
    plain_kind = str(kind).removesuffix(slot.suffix) if slot.suffix else kind
    if not isinstance(kind, str) or plain_kind not in slot.kinds:
        suffix = f" (each also with {slot.suffix})" if slot.suffix else ""
        raise ConfigError(
            f"{where}kind={kind!r} is unknown{_nearest(kind, slot.kinds)}; allowed: {', '.join(slot.kinds)}{suffix}"
        )
    parameters = {k: p for k, p in signature(slot.kinds[plain_kind]).items() if k not in slot.injected}
    parameters |= slot.extra
    _check_known(given, ["kind", *parameters], where)
    return {"kind": kind} | _resolve_parameters(given, parameters, where)


def _check_overlay(given: Any, section: Section, where: str) -> dict[str, Any]:
    given = _mapping(given, where)
    parameters = signature(section.target)
    _check_known(given, list(parameters), where)
    return {key: _checked(value, parameters[key], where) for key, value in given.items()}


def _resolve_parameters(given: Mapping, parameters: Mapping[str, Parameter], where: str) -> dict[str, Any]:
    resolved = {}
    for name, parameter in parameters.items():
        if name in given:
            resolved[name] = _checked(given[name], parameter, where)
        elif parameter.default is REQUIRED:
            raise ConfigError(f"{where}{name} is missing ({describe(parameter.annotation)})")
        else:
            resolved[name] = parameter.default
    return resolved


def _checked(value: Any, parameter: Parameter, where: str) -> Any:
    if value is False and not accepts(parameter.annotation, False) and accepts(parameter.annotation, "no"):
        return "no"  # what YAML 1.1 reads as false, as in `mixed_precision: no`
    if not accepts(parameter.annotation, value):
        raise ConfigError(f"{where}{parameter.name}={value!r:.200} must be {describe(parameter.annotation)}")
    return value


def _check_known(given: Mapping, allowed: list[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise ConfigError(f"{where}{key} is unknown{_nearest(key, allowed)}; allowed: {', '.join(allowed)}")


def _nearest(word: Any, allowed: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _mapping(given: Any, where: str) -> dict:
    if not isinstance(given, dict):
        raise ConfigError(f"{where.rstrip('.') or 'the config'} must be a mapping of keys, not {given!r}")
    return given


def _signature(target: str | None) -> Mapping[str, Parameter]:
    return signature(target) if target else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
