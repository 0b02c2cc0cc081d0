"""How a picture was drawn: the words of a command line, which draw it again, and hashes of the files that they name."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from xdiffusion.checkpoints.hashes import file_hash
from xdiffusion.checkpoints.learned_tokens import parse_tokens_spec
from xdiffusion.checkpoints.paths import existing_weights
from xdiffusion.cli import Parser
from xdiffusion.config_files import load_yaml
from xdiffusion.lora.base_identity import sample_of
from xdiffusion.lora.weights import parse_lora_spec
from xdiffusion.pictures import read_metadata

LISTS = ("prompt", "lora_path", "learned_tokens")  # flags that may be repeated


@dataclass(frozen=True)
class Recipe:
    """What a PNG says of how it was drawn.

    words: of the command line. hashes: of the files that a flag names, by flag; of the checkpoint its `fingerprint`.
    """

    words: list[str]
    hashes: dict[str, list[str]]

    def with_given(self, given: Sequence[str], keys: Mapping[str, str]) -> list[str]:
        """The words of the recipe with those given on top, which replace what the recipe says of the same thing.

        Args:
            given: words of a command line.
            keys: config key by flag, for a key that `--set` sets.
        """
        said = _values({*LISTS, *keys, "set"}, given)
        set_keys = {assignment.partition("=")[0] for assignment in said["set"]}
        replaced = [flag for flag in LISTS if said[flag]] + [flag for flag, key in keys.items() if key in set_keys]
        other_kinds = {key for flag, key in keys.items() if said[flag]} | set_keys  # whose settings are others too
        sections = tuple(key.removesuffix("kind") for key in other_kinds if key.endswith(".kind"))
        kept = [setting for setting in _values(["set"], self.words)["set"] if not setting.startswith(sections)]
        # a picture does not choose where files go
        words = without_flags(self.words, ["output_path", "set", *replaced])
        return [*words, *(f"--set={setting}" for setting in kept), *given]

    def differing(self, hashes: Mapping[str, list[str]]) -> list[str]:
        """The flags that name other files than those that drew the picture, whatever their names."""
        return [flag for flag, known in self.hashes.items() if hashes.get(flag) != known]


def png_texts(
    args: argparse.Namespace,
    checkpoint: Path,
    prompts: Sequence[str],
    sampling: Mapping[str, Any],
    hashes: Mapping[str, list[str]],
) -> dict[str, str]:
    """The texts of a PNG, for whoever wants to know how it was drawn; `command` and `hashes` are its recipe.

    Args:
        args: of the sampling command; args.words are those of its command line.
        checkpoint: the file that stood for --checkpoint.
        prompts: one per image.
        sampling: that section of the config.
        hashes: see `Recipe`.
    """
    return {
        "checkpoint": str(checkpoint),
        "loras": json.dumps(args.lora_path),
        "prompts": json.dumps(prompts),
        "seed": str(args.seed),
        "sampling": json.dumps(sampling),
        "hashes": json.dumps(hashes),
        "command": json.dumps(args.words),
    }


def read_recipe(picture: Path) -> Recipe:
    """The recipe of a PNG.

    Raises:
        ValueError: if the picture is none of ours.
    """
    texts = read_metadata(picture)
    try:
        words, hashes = json.loads(texts["command"]), json.loads(texts.get("hashes", "{}"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError
        if not isinstance(hashes, dict):
            raise TypeError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{picture} does not say how it was drawn: it is no picture of this command") from None
    return Recipe(words, hashes)


def path_beside_others(path: Path, texts: Mapping[str, str]) -> Path:
    """The path, or with the first number behind its name under which there is no picture that another command drew.

    Args:
        texts: of the picture that is to be written.
    """

    def is_free(path: Path) -> bool:
        try:
            known = read_metadata(path)
        except ValueError:
            return not path.exists()
        return all(known.get(name) == texts[name] for name in ("command", "hashes"))

    numbered = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(filter(is_free, chain([path], numbered)))


def without_flags(words: Sequence[str], flags: Iterable[str]) -> list[str]:
    """The words of a command line without some flags and their values."""
    return _finder(flags).parse_known_args(list(words))[1]


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of some values of each weight: what tells one model from another without reading gigabytes for it."""
    return _digest(json.dumps(sample_of(weights), sort_keys=True))


def file_hashes(args: argparse.Namespace) -> dict[str, list[str]]:
    """Hashes of all files that the flags of the sampling command name beside the checkpoint, by flag.

    Of their bytes; of a config of what it says, with its bases.

    Raises:
        CheckpointError: if one cannot be read.
    """
    paths = {
        "lora_path": [existing_weights(parse_lora_spec(text)[0])[0] for text in args.lora_path],
        "learned_tokens": [parse_tokens_spec(text)[0] for text in args.learned_tokens],
        "init_image": [Path(args.init_image)] if args.init_image else [],
        "mask_image": [Path(args.mask_image)] if args.mask_image else [],
    }
    hashes = {flag: [_hash(path) for path in named] for flag, named in paths.items() if named}
    if args.config_path:
        hashes["config_path"] = [_digest(OmegaConf.to_yaml(OmegaConf.create(load_yaml(args.config_path)), sort_keys=True))]
    return hashes


def _hash(path: Path) -> str:
    if not path.is_dir():
        return file_hash(path)
    hashes = [file_hash(file) for file in sorted(path.rglob("*")) if file.is_file()]  # of an adapter of peft
    return _digest("".join(hashes))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _values(flags: Iterable[str], words: Sequence[str]) -> dict[str, list[str]]:
    """What a command line says for some flags, each time that it does."""
    found = vars(_finder(flags).parse_known_args(list(words))[0])
    return {flag: values or [] for flag, values in found.items()}


def _finder(flags: Iterable[str]) -> argparse.ArgumentParser:
    finder = Parser(add_help=False)
    for flag in flags:
        finder.add_argument(f"--{flag}", action="append")
    return finder
