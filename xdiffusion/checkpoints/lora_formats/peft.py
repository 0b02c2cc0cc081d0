"""The folders of peft: `adapter_model.safetensors` and `adapter_config.json`, one folder for each component.

Keys are `base_model.model.<path>.lora_A.weight`; scaling is lora_alpha / r or, with use_rslora, lora_alpha / sqrt(r),
where rank_pattern and alpha_pattern name the modules that differ. A LoRA of a pipeline goes to `unet/` and
`text_encoder/` below the folder; one of any other model, and of a text encoder alone, into the folder itself, with that
model's own names. The keys of a pipeline's text encoder are written as transformers 5 names its modules, without
`text_model.`, and read with it too; with transformers 4 peft takes them by
`PeftModel.from_pretrained(..., key_mapping={"^encoder": "text_model.encoder"})` (peft 0.16 and later).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xdiffusion.checkpoints.component_names import (
    COMPONENTS,
    component_of,
    exchange_name,
    name_in_component,
    of_pipeline,
)
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats.factors import assemble
from xdiffusion.checkpoints.lora_formats.keys import sorted_by_key
from xdiffusion.checkpoints.native import reading_header
from xdiffusion.checkpoints.paths import is_adapter_folder, refuse_leftover
from xdiffusion.checkpoints.patterns import is_ending
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors, read_json
from xdiffusion.checkpoints.writing import save_safetensors, write_text

REPEATED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits that change the base, which peft repeats on loading
OTHER_UPDATES = {  # options of a LoraConfig with which A and B mean something else
    "alora_invocation_tokens": "the update counts from these tokens on",
    "arrow_config": "each token has a mixture of adapters of its own",
    "kasa_config": "the base loses singular values, and factors of others stand between A and B",
    "layer_replication": "the layers are those of a model in which some stand twice",
    "use_bdlora": "the factors are diagonals of blocks",
    "use_qalora": "A takes means of inputs",
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_folder(path: Path) -> LoRAFile:
    """The adapter of a folder, or those of its `unet` and `text_encoder`.

    Raises:
        CheckpointError: if there is none, or it is no LoRA.
    """
    modules: dict[str, LoRAFactors] = {}
    repairs: list[str] = []
    metadata: dict[str, str] = {}
    if not is_adapter_folder(path):
        raise CheckpointError(f"no LoRA in the folder {path}: neither it nor its unet or text_encoder has {CONFIG}")
    if (path / CONFIG).is_file():
        modules = _read_one(path, repairs, metadata)
        if of_pipeline(modules):
            modules = {exchange_name(name): factors for name, factors in modules.items()}
    for component in COMPONENTS:
        if (path / component / CONFIG).is_file():
            found = _read_one(path / component, repairs, metadata)
            modules |= {exchange_name(f"{component}.{name}"): factors for name, factors in found.items()}
    return LoRAFile(modules, "peft", metadata=metadata, repairs=tuple(repairs))


def write_folder(lora: LoRAFile, path: Path) -> None:
    """Write the folder, or a folder for each component: names are exchange names, or all of them those of another model.

    Raises:
        CheckpointError: if it cannot be written, or some modules only have a magnitude, which peft's config cannot say.
    """
    parts: dict[str | None, dict[str, LoRAFactors]] = {}
    pipeline = of_pipeline(lora.modules)
    for name, factors in lora.modules.items():
        component = component_of(name) if pipeline else None
        parts.setdefault(component, {})[name_in_component(name) if component else name] = factors
    for component in {None, *COMPONENTS} - parts.keys():
        refuse_leftover((path / component if component else path) / CONFIG)
    for component, modules in parts.items():
        folder = path / component if component else path
        tensors: dict[str, Tensor] = {}
        for name, factors in modules.items():
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = factors.lora_A, factors.lora_B
            if factors.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = magnitude_of(factors)
        config = {"peft_type": "LORA", "inference_mode": True, **config_of(modules)}
        save_safetensors(folder / WEIGHTS, tensors, {**lora.metadata, "format": "pt"})
        write_text(folder / CONFIG, json.dumps(config, indent=2))


def config_of(modules: Mapping[str, LoRAFactors]) -> dict[str, Any]:
    """The fields of peft's LoraConfig that give every module its rank and scaling.

    Raises:
        CheckpointError: if some modules have a DoRA magnitude and others none: one switch is for all.
    """
    with_magnitude = [name for name, f in modules.items() if f.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(modules):
        raise CheckpointError(
            f"peft's config has one use_dora for all modules; {len(with_magnitude)} of {len(modules)} have a magnitude"
        )
    use_rslora = all(f.use_rslora for f in modules.values())
    ranks = {name: f.rank for name, f in modules.items()}
    alphas = {name: f.lora_alpha if f.use_rslora == use_rslora else f.scaling * f.rank for name, f in modules.items()}
    keys = {name: name for name in modules}
    for name in modules:
        if any(other.endswith(f".{name}") for other in modules):  # patterns match endings
            keys[name] = f"^{re.escape(name)}"
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {keys[name]: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {keys[name]: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(modules),
        "use_rslora": use_rslora,
        "use_dora": bool(with_magnitude),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Complain of factors that belong to another base than the model itself, or are no plain LoRA's.

    Raises:
        CheckpointError: if a LoraConfig says so.
    """
    for field, meaning in OTHER_UPDATES.items():
        if config.get(field):
            raise CheckpointError(f"{path} has {field}={config[field]!r:.100}: {meaning}, which is not read here")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(REPEATED):
        raise CheckpointError(
            f"{path} has init_lora_weights={init!r}: peft takes the first factors out of the base again when it loads them; "
            "save it once more with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def alpha_from(config: Mapping[str, Any], name: str, rank: int) -> tuple[float, bool]:
    """(lora_alpha, use_rslora) that a LoraConfig means for a module; peft's patterns are regular expressions of endings."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for pattern, a in patterns.items() if is_ending(pattern, name)), config.get("lora_alpha", rank))
    return float(alpha), bool(config.get("use_rslora"))


def magnitude_of(factors: LoRAFactors) -> Tensor:
    """(out,) of a linear layer, (1, out, 1, 1) of a convolution."""
    ones = [1] * (factors.lora_A.dim() - 2)
    return factors.magnitude.reshape(1, -1, *ones) if ones else factors.magnitude


def _read_one(folder: Path, repairs: list[str], metadata: dict[str, str]) -> dict[str, LoRAFactors]:
    path = folder / CONFIG
    with reading_header(path):
        config = read_json(path)
        if config["peft_type"] != "LORA":
            raise CheckpointError(f"{path} is of the method {config['peft_type']!r}, not LORA")
        check_config(config, path)
    if (folder / WEIGHTS).is_file():
        tensors, header = load_safetensors(folder / WEIGHTS)
    else:
        tensors, header = load_pickled(folder / "adapter_model.bin"), {}
    metadata |= header
    loose = sorted_by_key(tensors, header, folder)
    if loose.dialect != "peft":
        raise CheckpointError(f"{folder / WEIGHTS} has the keys of {loose.dialect}, not those of peft")
    repairs += loose.repairs
    with reading_header(path):
        return assemble(loose.parts, folder, repairs, lambda name, rank: alpha_from(config, name, rank))
