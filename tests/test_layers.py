"""The architecture of docs/architecture.md as a test: who imports whom, and how large things may grow."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xdiffusion"
PAPER_KEY = re.compile(r"\[([A-Za-z]*[A-Z]\w*\+*)\]")  # a capital somewhere, as in [iDDPM]
# part -> the other parts it may import; the table of docs/architecture.md
MAY_IMPORT = {
    "diffusion": set(),
    "layers": set(),
    "checkpoints": {"places"},
    "data": {"downloads", "places"},
    "evaluation": set(),
    "signatures": set(),
    "cli": {"build", "config", "config_files", "memory", "streams"},
    "places": set(),
    "memory": set(),
    "streams": set(),
    "downloads": set(),
    "pictures": {"data"},
    "config_files": {"places"},
    "config": {"config_files", "signatures"},
    "lora": {"checkpoints"},
    "samplers": {"diffusion"},
    "networks": {"layers"},
    "text_encoders": {"downloads", "layers"},
    "autoencoders": {"layers"},
    "prompts": {"data"},
    "recipe": {"checkpoints", "cli", "config_files", "lora", "pictures"},
    "model": {"diffusion", "layers", "samplers"},
    "build": {
        "config",
        "config_files",
        "signatures",
        "places",
        "model",
        "checkpoints",
        "data",
        "diffusion",
        "text_encoders",
    },
    "held_out": {"model", "data", "diffusion", "evaluation", "lora"},
    "scoring": {"model", "checkpoints", "data", "evaluation", "held_out", "lora"},
    "captioned_scoring": {"model", "data", "evaluation", "held_out", "lora", "scoring"},
    "clip_towers": {"checkpoints", "data", "text_encoders", "training"},
    "report": {"checkpoints", "evaluation", "pictures", "scoring"},
    "training": {
        "model",
        "checkpoints",
        "data",
        "diffusion",
        "lora",
        "memory",
        "pictures",
        "places",
        "samplers",
        "text_encoders",
    },
    "loading": {"build", "checkpoints", "config", "config_files", "model"},
    "as_trained": {"build", "checkpoints", "config", "config_files", "loading"},
    "learned_words": {"checkpoints", "model", "text_encoders"},
    "stable_diffusion": {"as_trained", "build", "checkpoints", "config_files", "loading", "lora", "model", "samplers"},
    "commands": {"as_trained", "build", "checkpoints", "cli", "loading", "lora", "text_encoders"},
}
HEAVY = {"open_clip", "accelerate", "matplotlib", "torchvision", "tensorboard"}
NEVER = {"diffusers", "transformers", "peft"}
TRACKED = sorted(p for folder in ("xdiffusion", "training", "sampling", "bench") for p in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"  # the table has whole names
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def package_files():
    return [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py"]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    part = part_of(path)
    found = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("xdiffusion.")}
    assert part in MAY_IMPORT, f"{part} is missing in the table of the architecture"
    assert found - {part} <= MAY_IMPORT[part]


def test_the_table_in_the_architecture_document_is_the_one_tested():
    rows = re.findall(r"^\| `(\w+)` \|.*?\|([^|]*)\|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert {part: set(re.findall(r"`(\w+)`", allowed)) for part, allowed in rows} == MAY_IMPORT


def test_the_table_has_no_cycle():
    def reaches(start: str, part: str) -> bool:
        return any(p == start or reaches(start, p) for p in MAY_IMPORT[part])

    assert not [part for part in MAY_IMPORT if reaches(part, part)]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_reference_libraries_stay_out_and_heavy_imports_are_made_where_used(path):
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(tree)} & NEVER
    top = [statement for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom)]
    at_top = {name.split(".")[0] for statement in top for name in imports(statement)}
    allowed = {"accelerate"} if part_of(path) == "training" else set()  # training cannot do without it
    assert not at_top & (HEAVY - allowed)


@pytest.mark.parametrize("path", TRACKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_functions_and_constructors_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = node.end_lineno - node.lineno + 1
            straight_line = node.name in ("__init__", "fit")
            assert size <= (90 if straight_line else 60), f"{node.name} has {size} lines"
            if node.name == "__init__":
                count = len(node.args.args) - 1 + len(node.args.kwonlyargs)
                assert count <= 15, f"{count} arguments"
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            count = sum(isinstance(statement, ast.AnnAssign) for statement in node.body)
            assert count <= 15, f"{node.name} has {count} fields"


def test_paper_keys_are_told_from_other_brackets():
    text = "([iDDPM] eq. 1), [rsLoRA], [LoRA+] section 4, [DDPM]; x in [0, 1), in [min] of [a, b], FILE[:SCALE], [i]"
    assert PAPER_KEY.findall(text) == ["iDDPM", "rsLoRA", "LoRA+", "DDPM"]


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_paper_key_is_in_the_references(path):
    known = set(re.findall(r"^- \*\*\[([\w+]+)\]\*\*", (ROOT / "docs/references.md").read_text(), re.MULTILINE))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, documented)]
    assert set(PAPER_KEY.findall("\n".join(docstrings))) <= known


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_tests_are_read_in_one_sitting_too(path):
    assert len(path.read_text().splitlines()) <= 350


def test_names_that_say_nothing_are_not_used():
    forbidden = {"utils.py", "common.py", "helpers.py", "base.py"}
    assert not [p for p in TRACKED if p.name in forbidden]
