"""What `lora inspect` tells of a LoRA: as data, as text, and as a picture."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.writing import write_atomically
from xdiffusion.lora.merge import delta_norm

SHOWN = 12  # entries of the metadata, and
CHARACTERS = 60  # of each value


def summary(lora: LoRAFile) -> dict[str, Any]:
    """Everything that a LoRA file says, and |delta| (Frobenius norm) of each module and block, fit for JSON."""
    modules = {
        name: {
            "rank": factors.rank,
            "lora_alpha": factors.lora_alpha,
            "scaling": factors.scaling,
            "algorithm": "DoRA" if factors.magnitude is not None else "rsLoRA" if factors.use_rslora else "LoRA",
            "lora_A": list(factors.lora_A.shape),
            "lora_B": list(factors.lora_B.shape),
            "dtype": str(factors.lora_A.dtype).removeprefix("torch."),
            "delta": delta_norm(factors),
        }
        for name, factors in lora.modules.items()
    }
    damaged = [name for name, module in modules.items() if not math.isfinite(module["delta"])]
    warning = [f"the factors of {len(damaged)} modules are not finite, such as {damaged[0]}"] if damaged else []
    return {
        "format": lora.format,
        "step": lora.step,
        "base_hash": lora.base_hash,
        "parameters": sum(f.lora_A.numel() + f.lora_B.numel() for f in lora.modules.values()),
        "targets": dict(Counter(_target(name) for name in modules)),
        "tokens": {name: list(vector.shape) for name, vector in lora.tokens.items()},
        "metadata": dict(lora.metadata),
        "repairs": [*lora.repairs, *warning],
        "blocks": _blocks(modules),
        "modules": modules,
    }


def text(facts: Mapping[str, Any]) -> str:
    """A `summary` to read."""
    modules = facts["modules"].values()

    def values(key: str) -> str:
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in sorted({m[key] for m in modules}))

    hidden = len(facts["metadata"]) > SHOWN
    lines = [
        ("format", facts["format"]),
        ("algorithm", values("algorithm")),
        ("modules", f"{len(modules)}: " + ", ".join(f"{n} {target}" for target, n in facts["targets"].items())),
        ("rank", values("rank")),
        ("lora_alpha", values("lora_alpha")),
        ("scaling", values("scaling")),
        ("parameters", f"{facts['parameters']:,} in {values('dtype')}"),
        ("step", facts["step"] or ""),
        ("base", _shortened(facts["base_hash"] or "")),
        ("tokens", ", ".join(f"{name} {tuple(shape)}" for name, shape in facts["tokens"].items())),
        *(("repair", repair) for repair in facts["repairs"]),
        *(("metadata", f"{key} = {_shortened(value)}") for key, value in sorted(facts["metadata"].items())[:SHOWN]),
        ("", f"{len(facts['metadata']) - SHOWN} entries more; --json prints all" if hidden else ""),
    ]
    rows = [(name, b["modules"], ", ".join(map(str, b["ranks"])), f"{b['delta']:.4g}") for name, b in facts["blocks"].items()]
    described = "\n".join(f"{name:<10} {value}" for name, value in lines if value != "")
    return f"{described}\n\n{text_table(('block', 'modules', 'rank', '|delta|'), rows)}"


def draw(facts: Mapping[str, Any], path: Path, title: str) -> None:
    """Write a bar for |delta| of each block as a PNG."""
    from matplotlib.figure import Figure

    blocks = {name: block for name, block in facts["blocks"].items() if name != "all"}
    figure = Figure(figsize=(7, 1 + 0.25 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(blocks), [block["delta"] for block in blocks.values()])
    axes.invert_yaxis()
    axes.set_xlabel("|delta| (Frobenius norm)")
    axes.set_title(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def text_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under heads, the first to the left and the others to the right."""
    cells = [list(map(str, row)) for row in (heads, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]) for row in cells
    )


def _blocks(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Modules, ranks and |delta| (the root of the sum of squares) of each block, and of all."""
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for name, module in modules.items():
        blocks.setdefault(_block(name), []).append(module)
    blocks["all"] = list(modules.values())
    return {
        name: {
            "modules": len(members),
            "ranks": sorted({m["rank"] for m in members}),
            "delta": sum(m["delta"] ** 2 for m in members) ** 0.5,
        }
        for name, members in blocks.items()
    }


def _block(name: str) -> str:
    """network.down_blocks.0.resnets.1.conv1 -> network.down_blocks.0; a layer outside of blocks is a block by itself."""
    found = re.match(r".*?(?:blocks?|layers)(?:\.\d+)?(?=\.|$)", name)
    return found[0] if found else name


def _target(name: str) -> str:
    """...attn1.to_q -> to_q, ...attn1.to_out.0 -> to_out.0."""
    return re.search(r"[^.]+(?:\.\d+)?$", name)[0]


def _shortened(value: str) -> str:
    return value if len(value) <= CHARACTERS else f"{value[:CHARACTERS]}... ({len(value)} characters)"
