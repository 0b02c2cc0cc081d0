"""YAML -> a checked, frozen config.

A file may name other files under `base:` (read first, relative to it). Overrides come on top: `--set a.b=c` and the flags
of the command line take the same road. Then every key is checked against a schema: unknown (with the nearest match),
missing, or of the wrong type is an error, before any weight is made; and every default is written out, so that the
resolved config in a checkpoint stays true when a default changes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from xdiffusion.config_files import ConfigError, merge, nested
from xdiffusion.signatures import REQUIRED, Parameter, accepts, describe, signature


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
        suffix: a suffix that some kinds may carry (`_inverted`).
        with_suffix: these kinds.
    """

    kinds: Mapping[str, str]
    injected: frozenset[str] = frozenset()
    extra: Mapping[str, Parameter] = field(default_factory=dict)
    default: str | None = None
    suffix: str = ""
    with_suffix: Collection[str] = ()


@dataclass(frozen=True)
class Overlay:
    """A partial copy of another top-level section, laid over it in some runs: its keys are checked, none is filled in."""

    section: str


Schema = Mapping[str, Section | Slot]


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


def with_overrides(
    config: Mapping[str, Any], overrides: Mapping[str, Any], schema: Schema, source: str | None = None
) -> dict[str, Any]:
    """overrides on top of config; where they change a slot's kind, keys that the new kind does not have are dropped.

    `source` is named in errors, by default the overrides themselves.
    """
    merged = as_written(config)
    for path, slot in _slots(schema):
        kind, given = _at(overrides, f"{path}.kind"), _at(merged, path)
        if isinstance(given, dict) and kind not in (None, given.get("kind")):
            target = slot.kinds.get(str(kind).removesuffix(slot.suffix))
            kept = {*signature(target), *slot.extra} if target else set(given)
            for key in given.keys() - kept:
                del given[key]
    return merge(source or f"the overrides {overrides}", merged, overrides)


def as_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, resolved or not, as a plain dict of its own."""
    return OmegaConf.to_container(config) if isinstance(config, DictConfig) else deepcopy(dict(config))


def laid_over(config: Mapping[str, Any], section: str, schema: Schema) -> dict[str, Any]:
    """What a section of overlays lays over others of the config, by their names."""
    overlays = schema[section].children.items()
    return {overlay.section: config[section][key] for key, overlay in overlays if key in config[section]}


def as_it_holds(config: Mapping[str, Any], section: str, schema: Schema) -> dict[str, Any]:
    """The config with what a section of overlays lays over others changed to what holds there now."""
    plain = as_written(config)
    for name, overlay in laid_over(plain, section, schema).items():
        overlay.update({key: plain[name][key] for key in overlay})
    return plain


def _at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where a section on the way is none, which `resolve` will say."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _slots(children: Mapping[str, Section | Slot | Overlay], where: str = "") -> Iterator[tuple[str, Slot]]:
    for key, child in children.items():
        if isinstance(child, Slot):
            yield f"{where}{key}", child
        elif isinstance(child, Section):
            yield from _slots(child.children, f"{where}{key}.")


def with_home(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The config with the home folder for `~/` in the paths at these keys, which a shell leaves as it is behind KEY=."""
    given = [(key, _at(config, key)) for key in keys]
    at_home = [(key, value) for key, value in given if isinstance(value, str) and value.startswith("~/")]
    return merge("home", config, *(nested(key, str(Path(value).expanduser())) for key, value in at_home))


def keys_named(name: str, schema: Mapping[str, Section | Slot | Overlay]) -> list[str]:
    """The keys of a config that end in a name, of a slot those of any kind."""
    found = []
    for key, child in schema.items():
        if isinstance(child, Overlay):
            continue
        targets = child.kinds.values() if isinstance(child, Slot) else [child.target]
        if name in {*child.extra, *(own for target in targets for own in _signature(target))} - child.injected:
            found.append(f"{key}.{name}")
        if isinstance(child, Section):
            found += [f"{key}.{below}" for below in keys_named(name, child.children)]
    return found


def resolve(config: Mapping[str, Any], schema: Schema, source: str) -> DictConfig:
    """Check every key against the schema and write out every default.

    Args:
        config: what the files and the overrides say, plain.
        schema: the allowed sections.
        source: named in errors (the path of the file).

    Returns:
        A read-only config.

    Raises:
        ConfigError: naming the key, its value, and what is allowed.
    """
    try:
        resolved = _resolve_section(config, Section(children=schema), "", schema)
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
    if isinstance(given, str):
        meant = f"; meant: {where}kind={given}? allowed: {', '.join(slot.kinds)}"
        raise ConfigError(f"{where.rstrip('.')} must be a mapping of keys, not {given!r}{meant}")
    given = {"kind": slot.default} if given is None else _mapping(given, where)
    kind = given.get("kind", slot.default)
    if kind is None:
        raise ConfigError(f"{where}kind is missing; allowed: {', '.join(slot.kinds)}")
    plain_kind = str(kind).removesuffix(slot.suffix)
    plain_kind = plain_kind if plain_kind in slot.with_suffix else kind
    if not isinstance(kind, str) or plain_kind not in slot.kinds:
        suffix = f" ({', '.join(slot.with_suffix)} also with {slot.suffix})" if slot.suffix else ""
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
