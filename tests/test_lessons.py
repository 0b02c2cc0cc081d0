"""Every command and every Python block of the README and the lessons runs, with few steps."""

import ast
import re
import runpy
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from commands import set_words
from lora_cases import factors
from omegaconf import OmegaConf
from picture_folders import write_discs
from sd_files import write_native

from xdiffusion.build import build_model, image_shape, load_config
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import sd_layer_table, write_lora
from xdiffusion.checkpoints.native import save_model
from xdiffusion.cli import run

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs/lessons").glob("*.md"))]
FEW_STEPS = "2"
FEW = f"--num_training_steps {FEW_STEPS} --batch_size 2 --set sampling.steps=1 --set sampling.cfg_scale=1"
FEW += " --set clip.training.num_training_steps=2"
ONE = f"--num_training_steps {FEW_STEPS} --num_samples 10 --ranks 8 --targets config --set training.batch_size=2"
SHORT = {
    "training/image/train.py": FEW.split(),
    "sampling/image/sample.py": ["--sampling_steps", "2", "--num_samples", "2"],
    "sampling/image/mnist/sample.py": ["--sampling_steps", "2", "--num_samples", "2"],
    "sampling/image/evaluate.py": ["--sampling_steps", "2", "--num_samples", "10"],
    "training/image/ablate_lora.py": ONE.split(),
    "xdiffusion.commands.lora": [],
    "xdiffusion.commands.lora_add": [],
    "xdiffusion.commands.sd": [],
}
# of networks that tests/test_configs.py trains as they are
SMALL_MNIST = "{channels: [32, 32, 32], num_res_blocks: 1, head_dim: 16}"
SMALL = ["model.network.channels=[16,16]", "model.network.transformer_depth=[1,1]", "model.network.head_dim=8"]
INSTALLED = ("lora", "lora_add", "sd")
STABLE_DIFFUSION = "v1-5-pruned-emaonly.safetensors"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    return [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]


def shortened(command: str) -> tuple[str, list[str]]:
    """(script or module, arguments) of a documented command, with few steps, small networks and without a download."""
    command = re.sub(r"diffusion-\d+", f"diffusion-{FEW_STEPS}", command)
    words = shlex.split(re.sub(r"(configs/image/sd/|image/folder/)(sd\w+)", r"\1\2_tiny", command))
    python, script, *arguments = [word for word in words if word != "-m"]
    if python in INSTALLED:
        return f"xdiffusion.commands.{python}", [script, *arguments]
    assert python == "python"
    arguments += SHORT[script]
    if script == "training/image/ablate_lora.py" or "configs/image/digits/" in command:
        arguments += set_words(SMALL)
    if "mnist" in command and script == "training/image/train.py":
        arguments += ["--set", "model.text_encoder.pretrained=null", "--data_dir", "mnist"]
    if "mnist" in command:
        arguments += ["--force_cpu"]
    return script, arguments


def shapes_said(block: str) -> dict[str, tuple[int, ...]]:
    """The shapes in a block's comments, `# x0: (32, 1, 24, 24)`."""
    comments = " ".join(line.partition("#")[2] for line in block.splitlines())
    return {name: ast.literal_eval(shape) for name, shape in re.findall(r"(\w+): (\([\d, ]*\))", comments)}


def shapes_of(block: str, names: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a block has made."""
    nodes = ast.walk(ast.parse(block))
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name: tuple(names[name].shape) for name in made if hasattr(names[name], "shape")}


def main_of(script: str):
    """The function main of a script, or of a module that is run with -m."""
    return runpy.run_path(str(ROOT / script))["main"] if script.endswith(".py") else import_module(script).main


def link_repository(folder: Path) -> None:
    """The folders that commands name; in place of MNIST's 44 million parameters, minutes in bf16 on old cores, a few."""
    for name in ("training", "sampling"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    config = Path("configs/image/mnist/ddpm_32x32_v_continuous_clip.yaml")
    (folder / config).write_text(f"base: {ROOT / config}\nmodel: {{network: {SMALL_MNIST}}}\n")


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> Path:
    """Where the classifiers of evaluate.py lie, which are trained once for all documents."""
    return tmp_path_factory.mktemp("judges")


def write_loras(folder: Path) -> None:
    """LoRAs of two layers of Stable Diffusion 1.5 under the names that documents speak of."""
    layers = [name for name in sd_layer_table("sd15") if name.endswith("down_blocks.0.attentions.0.proj_in")]
    for seed, name in enumerate(("style", "ink")):
        modules = {layer: factors(sd_layer_table("sd15")[layer], seed=seed) for layer in layers}
        write_lora(LoRAFile(modules), folder / f"{name}.safetensors", "kohya")


def write_stable_diffusion(folder: Path) -> None:
    """A tiny twin under the name of the checkpoint that documents load, and the pictures that they speak of."""
    write_native("sd15_tiny", folder / "native.safetensors")
    words = ["convert", str(folder / "native.safetensors"), str(folder / STABLE_DIFFUSION), "--to", "original"]
    assert run(main_of("xdiffusion.commands.sd"), words) == 0
    (folder / "native.safetensors").unlink()
    for name, size in (("photos", 64), ("kept", 60)):
        write_discs(folder / name, 4, size, {"red": (230, 20, 20), "blue": (20, 20, 230)})
    write_discs(folder / "white", 1, 64, {"white": (255, 255, 255)})
    for name, source in (("sketch.png", "photos"), ("mask.png", "white")):
        (folder / name).write_bytes((folder / source / "disc_0.png").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.stem)
def test_every_command_of_a_document_runs(document, tmp_path, monkeypatch, fake_mnist, judges):
    link_repository(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/judge").symlink_to(judges)
    (tmp_path / "mnist").symlink_to(fake_mnist)
    monkeypatch.chdir(tmp_path)
    if STABLE_DIFFUSION in document.read_text():
        write_stable_diffusion(tmp_path)
    if "lora inspect style.safetensors" in commands(document):
        write_loras(tmp_path)
    # a few steps leave lora_B and the un-averaged weights near zero, not at it
    assert commands(document)
    for command in commands(document):
        script, arguments = shortened(command)
        assert run(main_of(script), arguments) == 0, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.stem)
def test_every_python_block_runs(document, tmp_path, monkeypatch):
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)
    if any(STABLE_DIFFUSION in block for block in blocks(document, "python")):
        write_stable_diffusion(tmp_path)
    for path in {Path(p) for block in blocks(document, "python") for p in re.findall(r'load_model\("(output/.+?)"\)', block)}:
        config = load_config(ROOT / f"configs/image/digits/{path.parent.name}.yaml", ["model.text_encoder.pretrained=null"])
        plain, shape = OmegaConf.to_container(config), image_shape(config)
        save_model(path, build_model(config).state_dict(), config=plain, image_shape=shape, step=0)

    def attention() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("to_q", "to_k")})

    names = {"torch": torch, "model": attention(), "fresh_model": attention()}
    for block in blocks(document, "python"):
        block = re.sub(r"^steps = \d+", f"steps = {FEW_STEPS}", block, flags=re.MULTILINE)
        trains = "# ... train ..." in block
        before, _, after = block.partition("# ... train ...")
        exec(before, names)
        if trains:
            for parameter in names["model"].parameters():
                parameter.data.add_(0.1)
            exec(after, names)
        if said := shapes_said(block):
            assert said == shapes_of(block, names)
    assert not blocks(document, "python") or [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("document", [*DOCUMENTS, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem)
def test_links_and_pictures_exist(document):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda p: p.stem)
def test_names_in_the_code_walk_exist(document):
    """`name` in a lesson's paragraph "The code" stands in a file that the paragraph names."""
    section = re.search(r"^## The code\n(.*?)^## ", document.read_text(), re.MULTILINE | re.DOTALL)[1]
    files = re.findall(r"`((?:xdiffusion|training)/[\w/]+\.py)", section) + re.findall(r"`(\w+\.py)`", section)
    there = {name for file in files for name in identifiers(next(ROOT.glob(file if "/" in file else f"**/{file}")))}
    names = re.findall(r"`([A-Za-z_]{4,})`", section)
    assert names and not [n for n in names if n not in there]


def identifiers(path):
    """The words of a file's code, comments and docstrings left out."""
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            del node.body[0]
            node.body = node.body or [ast.Pass()]
    return set(re.findall(r"\w+", ast.unparse(module)))
