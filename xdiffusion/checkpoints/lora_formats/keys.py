"""Which dialect a file's keys are in, and what each key says: all that is known about the spelling of named formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from xdiffusion.checkpoints.component_names import exchange_name
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_formats import lycoris
from xdiffusion.checkpoints.lora_formats.factors import Parts

_PEFT_PART = r"\.(?P<part>lora_[AB]|lora_magnitude_vector|alpha)(?:\.(?!(?:weight|bias)$)(?P<adapter>\w+))?(?:\.weight)?"
# dialect -> a key of it; the first that matches counts
_KEYS = {
    "cloneofsimo": r"(?P<module>\w+:[0-9]+):(?P<part>down|up)",
    "native": r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude)",
    "kohya": r"(?P<module>(?:lora|lycoris)_\w+|(?:diffusion_model|text_encoders\.clip_[lh]\.transformer|clip_l)\.[\w.]+"
    r"|unet\.(?:(?:in|out)put_blocks|middle_block|time_embed|out)\.[\w.]+)"
    rf"\.(?P<part>lora_(?:down|up|A|B)\.weight|alpha|scale|dora_scale|{lycoris.KEY_PARTS})",
    "diffusers-processors": r"(?P<module>.+?)(?:\.processor)?\.(?P<projection>to_[qkv]|to_out)_lora\.(?P<part>down|up)\.weight",
    "peft": rf"base_model\.model\.(?P<module>.+?){_PEFT_PART}",
    "diffusers": rf"(?P<module>.+?){_PEFT_PART}",
    "diffusers-sd15": r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight",
}  # fmt: skip
_PAIRS = {  # that diffusers' own scripts wrote into one file -> the dialect it is told by
    frozenset({"diffusers", "diffusers-sd15"}): "diffusers-sd15",  # layers outside the attention in today's style
    frozenset({"diffusers-processors", "diffusers-sd15"}): "diffusers-processors",  # 0.18-0.21: UNet, text encoder
}
KEYS = {dialect: re.compile(pattern) for dialect, pattern in _KEYS.items()}
_OTHER_METHODS = {  # a key's ending -> what has it, of LyCORIS
    r"oft_\w+": "an OFT",
    r"[ab][12]\.weight": "a GLoRA",
    "on_input": "an IA3",
    r"[bw]_norm|diff(_b)?": "a difference of whole weights",
    r"bias_(indices|values|size)": "a LoRA with a sparse difference of whole weights",
}
_PARTS = {
    "down": "lora_A",
    "lora_down.weight": "lora_A",
    "lora_A.weight": "lora_A",
    "up": "lora_B",
    "lora_mid.weight": "lora_mid",
    "lora_up.weight": "lora_B",
    "lora_B.weight": "lora_B",
    "dora_scale": "magnitude",
    "lora_magnitude": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
_DOUBLED = re.compile(
    r"^(?P<kept>lora_unet_|lora_te1?_|unet\.|text_encoder\.)(?:unet[._]|text_encoder[._]|lora_unet_|lora_te1?_|base_model\.model\.)+"
)
TOKEN = "token:"  # before a learned token's name in native files
# A1111's and OneTrainer's; what has another ending is for another text encoder, or stands behind one
_BUNDLED = re.compile(r"bundle_emb\.(?P<token>.+)\.(?:string_to_param\.\*|emb_params|clip_[lh])")


@dataclass
class Loose:
    """A file's tensors, sorted: `parts` by module in the file's own spelling."""

    dialect: str
    parts: Parts = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    repairs: list[str] = field(default_factory=list)


def sorted_by_key(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Loose:
    """Tell the dialect of a file from its keys, and its tensors by module and part.

    Raises:
        CheckpointError: if a key is of no dialect, the dialects do not go together, or two keys mean one tensor.
    """
    matches, tokens, left_out = {}, {}, []
    for key, tensor in tensors.items():
        if token := _token_of(key, metadata):
            tokens[token] = tensor
            continue
        if key.startswith("bundle_emb."):
            left_out.append(f"{key!r} left out: it is no embedding of a prompt's word")
            continue
        matches[key] = next(((d, m) for d, pattern in KEYS.items() if (m := pattern.fullmatch(key))), None)
        if matches[key] is None:
            raise CheckpointError(f"{path} {_what_else(key)}")
    if not matches:
        raise CheckpointError(f"{path} is not a LoRA file: it holds no factors")
    loose = Loose(_dialect({dialect for dialect, _ in matches.values()}, path), tokens=tokens, repairs=left_out)
    for key, (_, match) in matches.items():
        module, part = _module_and_part(match, loose.repairs)
        if part in loose.parts.setdefault(module, {}):
            raise CheckpointError(f"{path}: {key!r} and another key both give {part} of {module}")
        loose.parts[module][part] = tensors[key]
    loose.repairs = list(dict.fromkeys(loose.repairs))
    return loose


def _what_else(key: str) -> str:
    """The rest of the error for a file that holds a key of no dialect."""
    if re.search(r"\.lora_[AB]\.(?:\w+\.)?bias$", key):
        return f"has biases beside its factors (peft's lora_bias=True), which are not read here: {key!r}"
    for ending, method in _OTHER_METHODS.items():
        if re.search(rf"\.{ending}$", key):
            return f"is {method} (LyCORIS), which is not read here: {key!r}"
    return f"is not a LoRA file that is known here: {key!r} is a key of no LoRA format"


def _dialect(found: set[str], path: Path) -> str:
    """The dialect that the file as a whole is in."""
    if len(found) == 1:
        return next(iter(found))
    if pair := _PAIRS.get(frozenset(found)):
        return pair
    raise CheckpointError(f"{path} mixes the keys of {' and '.join(sorted(found))}: it is no whole file of either")


def _token_of(key: str, metadata: Mapping[str, str]) -> str | None:
    if key.startswith(TOKEN):
        return key.removeprefix(TOKEN)
    if bundled := _BUNDLED.fullmatch(key):
        return bundled["token"]
    return key if metadata.get(key) == "<embed>" or re.fullmatch(r"<[^:]+>", key) else None


def _module_and_part(match: re.Match, repairs: list[str]) -> tuple[str, str]:
    groups = match.groupdict()
    module = groups["module"]
    if projection := groups.get("projection"):
        module = f"{module}.{projection}{'.0' * (projection == 'to_out')}"
    if groups.get("adapter"):
        repairs.append(f"the adapter's name {groups['adapter']!r} taken out of the keys")
    if doubled := _DOUBLED.match(module):
        repairs.append(f"doubled prefix {doubled[0]!r} read as {doubled['kept']!r}")
        module = doubled["kept"] + module[doubled.end() :]
    return module, _PARTS.get(groups["part"], groups["part"])


def named_as_exchanged(loose: Loose, path: Path) -> Parts:
    """The parts under exchange names.

    Raises:
        CheckpointError: if two modules of the file come to one name.
    """
    parts = {exchange_name(module): tensors for module, tensors in loose.parts.items()}
    if len(parts) != len(loose.parts):
        raise CheckpointError(f"{path}: two of its {len(loose.parts)} modules have one name in different spellings")
    return parts
