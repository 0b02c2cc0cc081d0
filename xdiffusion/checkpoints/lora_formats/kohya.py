"""The files of kohya-ss/sd-scripts and of the A1111 web UI: `lora_unet_<path with underscores>.lora_down.weight`.

Read are also the original names of a UNet, `lora_unet_input_blocks_1_1_...`, as A1111 reads them, and those with dots,
`diffusion_model.input_blocks.1.1...` and `text_encoders.clip_l.transformer...`, of ComfyUI, and `unet.input_blocks.1.1...` and
`clip_l...`, of OneTrainer; and LyCORIS' products (`lycoris`).

Scaling is alpha / rank with alpha a tensor of each module, or A1111's `scale`; a file without either means alpha = rank.
Underscores for dots are not unique, so module names come from a table of the model's layers, never from the key alone.
(diffusers 0.42 gives every attention layer of such a file the most frequent alpha; where alphas differ, write its own format
for it. Before 0.39 it leaves out conv_in, conv_out and the time embedding of such a file.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdiffusion.checkpoints.component_names import component_of
from xdiffusion.checkpoints.diffusers import unet_name_from_diffusers
from xdiffusion.checkpoints.drawing_settings import drawn_by
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import lycoris
from xdiffusion.checkpoints.lora_formats.factors import Parts, assemble, folded, said_of_xl
from xdiffusion.checkpoints.lora_formats.keys import Loose
from xdiffusion.checkpoints.lora_formats.layer_table import SD_BASES, LayerTable, sd_base_of, sd_layer_table
from xdiffusion.checkpoints.stable_diffusion import unet_name_to_original
from xdiffusion.checkpoints.writing import save_in_order, write_atomically

_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_OTHER_PREFIXES = {
    "lora_te1_": "lora_te_",
    "diffusion_model.": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te_",
    "text_encoders.clip_h.transformer.": "lora_te_",
    "unet.": "lora_unet_",
    "clip_l.": "lora_te_",
    "lycoris_": "lora_unet_",
}
_UNUSED_LAYER = re.compile(r"clip_h\.transformer\.text_model\.encoder\.layers\.23\.")
_MODEL_VERSION = {"sd15": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
                  "sd21": {"ss_base_model_version": "sd_v2", "ss_v2": "True"}}  # fmt: skip

_WORDS = {
    ("diffusion.prediction", "eps"): ("modelspec.prediction_type", "epsilon"),
    ("diffusion.prediction", "v"): ("modelspec.prediction_type", "v"),
    ("diffusion.schedule.zero_terminal_snr", "False"): ("ss_zero_terminal_snr", "False"),
    ("diffusion.schedule.zero_terminal_snr", "True"): ("ss_zero_terminal_snr", "True"),
}


def read(loose: Loose, path: Path, names: LayerTable | None) -> dict[str, LoRAFactors]:
    """Factors by exchange name.

    Raises:
        CheckpointError: if a module is none of the table's, nor of Stable Diffusion's, or its product does not fit it.
    """
    sd = sd_layer_table("sd21")  # its names hold those of 1.5
    known = {_flat(_original_name(name)): name for name in sd.part("unet")} | {_flat(name): name for name in sd}
    known |= {_flat(name).replace("te_text_model_", "te_"): name for name in sd.part("text_encoder")}  # transformers 5
    known |= {_flat(name): name for name in names or () if component_of(name)}
    parts = {}
    unknown = []
    for module, tensors in loose.parts.items():
        name = known.get(_as_kohya(module))
        if name is None and (why := _without_effect(module, tensors)):
            loose.repairs.append(f"{module} is left out: {why}")
        elif name is None:
            unknown.append(module)
        elif name in parts:
            raise CheckpointError(f"{path}: {module} is there in two spellings")
        else:
            parts[name] = tensors
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} of its {len(loose.parts)} modules are no layers of Stable Diffusion 1.x or 2.x"
            f"{' nor of this model' if names else ''}, such as {unknown[0]}"
            + said_of_xl({module: t["lora_A"] for module, t in loose.parts.items() if "lora_A" in t})
        )
    return assemble(_without_products(parts, names, path, loose.repairs), path, loose.repairs, of_peft=False)


def _without_effect(module: str, tensors: Mapping[str, Tensor]) -> str:
    """Why a module of no layer may be left out, as ComfyUI extracts such from a whole text encoder; "" if it may not."""
    if _UNUSED_LAYER.search(module):
        return "no picture depends on the last layer of 2.x's text encoder"
    return "" if all(tensors[part].any() for part in ("lora_A", "lora_B") if part in tensors) else "it changes nothing"


def _without_products(parts: Parts, names: LayerTable | None, path: Path, repairs: list[str]) -> Parts:
    """The parts with LoRAs in the place of LyCORIS' other methods, told in `repairs`."""
    methods = {name: method for name, tensors in parts.items() if (method := lycoris.method_of(tensors))}
    if not methods:
        return parts
    tables = [names or {}, *map(sd_layer_table, SD_BASES)]
    plain = dict(parts)
    for name in methods:
        shapes = dict.fromkeys(table[name] for table in tables if name in table)
        plain[name] = lycoris.as_lora(parts[name], shapes, name, path)
    for method, count in Counter(methods.values()).items():
        repairs.append(f"{count} modules of {method} read as LoRAs of higher rank, with the same updates")
    return plain


def write(lora: LoRAFile, path: Path) -> None:
    """Write a file with every alpha, and the header that A1111 reads.

    Raises:
        CheckpointError: if a module is of neither component.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in lora.modules.items():
        if component_of(name) is None:
            raise CheckpointError(f"kohya's format has no name for {name}: it knows a UNet's and a text encoder's layers")
        factors = factors if factors.scaling else folded(factors)  # readers take alpha 0 for alpha = rank
        flat = _flat(name)
        tensors[f"{flat}.lora_down.weight"] = factors.lora_A.contiguous()
        tensors[f"{flat}.lora_up.weight"] = factors.lora_B.contiguous()
        # float32 whatever the factors are: their type may not hold alpha
        tensors[f"{flat}.alpha"] = torch.tensor(factors.scaling * factors.rank, dtype=torch.float32)
        if factors.magnitude is not None:
            ones = [1] * (factors.lora_A.dim() - 1)
            tensors[f"{flat}.dora_scale"] = factors.magnitude.reshape(-1, *ones).contiguous()
    said_of_run = {key: value for key, value in lora.metadata.items() if key.startswith("ss_")}
    if said_of_run.get("ss_network_module", "").startswith("lycoris"):  # these are plain factors, whatever it trained
        said_of_run = {key: value for key, value in said_of_run.items() if not key.startswith("ss_network_")}
    header = _header(lora, path) | said_of_run
    header |= _rank_and_alpha(lora)
    said = dict(entry for key, value in drawn_by(lora.config).items() if (entry := word(key, value)))
    header |= {key: text for key, text in said.items() if key.startswith("ss_")}

    def write_with_hashes(temporary: Path) -> None:
        save_in_order(tensors, temporary, header)  # kohya hashes a file that has the ss_ entries alone
        hashes = _hashes(temporary)
        save_in_order(tensors, temporary, {**lora.metadata, **said, **header, **hashes})

    write_atomically(path, write_with_hashes)


def word(key: str, value: Any) -> tuple[str, str] | None:
    """The header's entry that says one value of `drawn_by`, as sd-scripts writes it; None where it has no word for it."""
    if key == "model.text_encoder.clip_skip":
        return "ss_clip_skip", str(value)
    return _WORDS.get((key, str(value)))


def _original_name(name: str) -> str:
    """unet.down_blocks.0.attentions.0.proj_in -> unet.input_blocks.1.1.proj_in."""
    ours = unet_name_from_diffusers(f"{name.removeprefix('unet.')}.")  # the tables' pairs end in a dot
    return f"unet.{unet_name_to_original(ours)[:-1]}"


def _as_kohya(module: str) -> str:
    """A module of a file in the spelling of `_flat`."""
    for prefix, kohyas in _OTHER_PREFIXES.items():
        if module.startswith(prefix):
            return kohyas + module.removeprefix(prefix).replace(".", "_")
    return module


def _flat(name: str) -> str:
    component, _, rest = name.partition(".")
    return _PREFIX.get(component, f"{component}_") + rest.replace(".", "_")


def _header(lora: LoRAFile, path: Path) -> dict[str, str]:
    shapes = {name: (f.lora_B.shape[0], prod(f.lora_A.shape[1:])) for name, f in lora.modules.items()}
    header = {"ss_network_module": "networks.lora", "ss_network_args": json.dumps({}), "ss_output_name": path.stem}
    if lora.step:
        header["ss_steps"] = str(lora.step)
    return header | _MODEL_VERSION.get(sd_base_of(shapes), {})


def _rank_and_alpha(lora: LoRAFile) -> dict[str, str]:
    """One value each, or kohya's word for different ones."""
    ranks = {f.rank for f in lora.modules.values()}
    alphas = {f.scaling * f.rank for f in lora.modules.values()}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }


def _hashes(path: Path) -> dict[str, str]:
    """sshs_model_hash: SHA-256 of what follows the header. sshs_legacy_hash: 8 digits of that of 64 KiB at 1 MiB."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        model = hashlib.sha256()
        while block := file.read(2**20):
            model.update(block)
        file.seek(0x100000)
        legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": legacy}
