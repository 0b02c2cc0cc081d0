"""The commands `lora` and `lora_add` as a user types them: what they write, what they say, and the quick reference."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from commands import ROOT, SAMPLE, files_in, run_script
from lora_cases import COMMANDS, SAMPLING, command, deltas, factors, pixels, relative, write_files
from PIL import Image

from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import FORMATS, read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.commands import lora


@pytest.fixture
def files(tiny_run, work_folder):
    """The current folder, with the files of `write_files` in it."""
    write_files(tiny_run, work_folder)
    return work_folder


# --- help ---


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_fast_and_the_console_script_is_this_module(name):
    words = [sys.executable, "-X", "importtime", "-m", f"xdiffusion.commands.{name}", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(f"usage: {name} ")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "omegaconf", "tqdm", "matplotlib"}
    script = re.search(rf'^{name} = "(.*):(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert getattr(import_module(script[1]), script[2]) is vars(sys.modules[f"xdiffusion.commands.{name}"])["command"]


def test_the_help_names_every_format_that_is_written():
    named = re.findall(r"[\w-]+", lora.CONVERTED.replace("(a folder)", ""))
    assert named == [name for name, kind in FORMATS.items() if kind.write]


# --- lora inspect, convert ---


def test_inspect_tells_what_is_in_the_file(files, capsys):
    assert command("lora inspect style.safetensors --json --plot style.png") == 0
    facts = json.loads(capsys.readouterr().out)
    read = read_lora(files / "style.safetensors")
    assert (facts["format"], facts["base_hash"], facts["step"]) == ("native", read.base_hash, 2)
    assert facts["modules"].keys() == read.modules.keys()
    for name, module in read.modules.items():
        told = facts["modules"][name]
        assert (told["rank"], told["lora_alpha"], told["scaling"]) == (2, 3.0, 1.5)
        assert told["delta"] == pytest.approx(float(module.delta().norm()), rel=1e-5)
    total = sum(module.delta().square().sum() for module in read.modules.values())
    assert facts["blocks"]["all"]["delta"] == pytest.approx(float(total.sqrt()), rel=1e-5)
    assert sum(block["modules"] for block in facts["blocks"].values()) == 2 * len(read.modules)
    assert sum(facts["targets"].values()) == len(read.modules)
    with Image.open("style.png") as picture:
        assert picture.format == "PNG"
    assert command("lora inspect sd_style.safetensors") == 0
    out = capsys.readouterr().out
    assert re.search(r"^format +kohya$", out, re.MULTILINE)
    assert re.search(r"^unet\.mid_block +9 +1 +[\d.]+$", out, re.MULTILINE)
    assert re.search(r"^text_encoder\.text_model\.encoder\.layers\.11 +4 ", out, re.MULTILINE)


def test_convert_keeps_every_update(files, capsys):
    before = deltas("sd_style.safetensors")
    for to in ("peft", "diffusers", "cloneofsimo", "native"):
        output = to if to == "peft" else f"{to}.safetensors"
        assert command(f"lora convert sd_style.safetensors {output} --to {to} --base sd15") == 0
        assert f"{output}: {len(before)} modules, {to}" in capsys.readouterr().out
        assert all(relative(delta, before[name]) < 1e-6 for name, delta in deltas(output).items())
    assert command("lora convert sd_style.safetensors half.safetensors --to kohya --dtype float16") == 0
    halves = read_lora(files / "half.safetensors").modules.values()
    assert {tensor.dtype for f in halves for tensor in (f.lora_A, f.lora_B)} == {torch.float16}


def test_a_yaml_names_the_layers_of_its_model(files, tiny_run):
    config = files / "tiny.yaml"
    config.write_text((tiny_run.checkpoint.parent / "config.yaml").read_text())
    assert command("lora convert style.safetensors flat.safetensors --to kohya") == 0
    assert command("lora convert flat.safetensors named.safetensors --to native --base tiny.yaml") == 0
    before, after = deltas("style.safetensors"), deltas("named.safetensors")
    assert before.keys() == after.keys()
    assert all(relative(after[name], before[name]) < 1e-6 for name in before)


# --- lora merge, resize ---


def test_merge_adds_updates_in_the_format_of_the_first(files, capsys):
    first, second = deltas("sd_style.safetensors"), deltas("sd_ink.safetensors")
    exact = {name: 0.7 * first[name] - 0.3 * second[name] for name in first}
    inputs = "sd_style.safetensors:0.7 sd_ink.safetensors:-0.3"
    assert command(f"lora merge {inputs} both.safetensors") == 0
    out = capsys.readouterr().out
    assert out.count("unet.") == 144
    assert float(re.search(r"largest relative error (\S+)", out)[1]) < 1e-6
    merged = read_lora(files / "both.safetensors")
    assert merged.format == "kohya"
    assert all(relative(delta, exact[name]) < 1e-6 for name, delta in deltas("both.safetensors").items())
    assert command(f"lora merge {inputs} cut.safetensors --method svd --rank 1") == 0
    rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines() if " 1 " in row}
    style, ink, cut = (read_lora(files / f"{n}.safetensors").modules for n in ("sd_style", "sd_ink", "cut"))
    for name in list(cut)[:3]:
        full = 0.7 * style[name].delta(torch.float64) - 0.3 * ink[name].delta(torch.float64)
        S = torch.linalg.svdvals(full)
        assert relative(cut[name].delta(torch.float64), full) == pytest.approx(float(rows[name][1]), rel=0.1)
        assert float(S[1:].square().sum() / S.square().sum()) == pytest.approx(float(rows[name][2]), rel=0.1)


def test_merge_of_two_spellings_of_the_same_layers(files):
    assert command("lora convert ink.safetensors ink_diffusers.safetensors --to diffusers") == 0
    assert command("lora merge style.safetensors ink_diffusers.safetensors both.safetensors") == 0
    first, second, both = (deltas(f"{name}.safetensors") for name in ("style", "ink", "both"))
    assert both.keys() == first.keys()
    assert all(relative(both[name], first[name] + second[name]) < 1e-6 for name in both)
    words = ["--checkpoint", "model.safetensors", *SAMPLING, "--output_path"]
    assert run_script(SAMPLE, *words, "both", "--lora_path", "both.safetensors") == 0
    assert run_script(SAMPLE, *words, "two", "--lora_path", "style.safetensors", "--lora_path", "ink.safetensors") == 0
    assert np.abs(pixels("both/lora.png") - pixels("two/lora.png")).max() <= 1


def test_a_learned_word_that_a_merge_renames_is_told(files, capsys):
    for name, word in (("style", torch.ones(8)), ("ink", torch.zeros(8))):
        lora = replace(read_lora(files / f"{name}.safetensors"), tokens={"<s1>": word, f"<{name}>": word + 1})
        write_lora(lora, files / f"{name}.safetensors", "native")
    for line in (
        "lora merge style.safetensors ink.safetensors both.safetensors",
        "lora_add style.safetensors ink.safetensors both.safetensors 0.3",
    ):
        assert command(line) == 0
        told = "both.safetensors: <s1> of ink.safetensors is called <s1-2>: another <s1> was there before\n"
        assert told in capsys.readouterr().err
        assert read_lora(files / "both.safetensors").tokens.keys() == {"<s1>", "<style>", "<s1-2>", "<ink>"}
    assert command("lora merge style.safetensors style.safetensors same.safetensors") == 0
    assert "<s1>" not in capsys.readouterr().err


def test_resize_cuts_the_rank(files, capsys):
    assert command("lora resize style.safetensors small.safetensors --rank 1") == 0
    assert {f.rank for f in read_lora(files / "small.safetensors").modules.values()} == {1}
    assert read_lora(files / "small.safetensors").base_hash == read_lora(files / "style.safetensors").base_hash
    assert command("lora resize style.safetensors same.safetensors --energy 1 --dtype float32") == 0
    before, after = deltas("style.safetensors"), deltas("same.safetensors")
    assert all(relative(after[name], before[name]) < 1e-6 for name in before)


# --- lora apply, extract ---


def test_apply_makes_a_model_that_draws_as_the_unmerged_one(files, capsys):
    assert command("lora apply model.safetensors style.safetensors:0.5 styled.safetensors") == 0
    base, styled = load_model_file(files / "model.safetensors"), load_model_file(files / "styled.safetensors")
    assert (styled.config, styled.image_shape, styled.step) == (base.config, base.image_shape, base.step)
    added = read_lora(files / "style.safetensors").modules
    assert added
    for name, tensor in base.tensors.items():
        module = added.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = tensor if module is None else tensor + 0.5 * module.delta().view(tensor.shape)
        assert torch.allclose(styled.tensors[name], expected, atol=1e-6)
        assert (module is None) == torch.equal(styled.tensors[name], tensor)
    sample = [SAMPLE, *SAMPLING, "--output_path"]
    assert run_script(*sample, "merged", "--checkpoint", "styled.safetensors") == 0
    lora_words = ["--checkpoint", "model.safetensors", "--lora_path", "style.safetensors:0.5"]
    assert run_script(*sample, "unmerged", *lora_words) == 0
    merged, unmerged = pixels("merged/samples.png"), pixels("unmerged/lora.png")[20:]
    assert np.abs(merged - unmerged).max() <= 2
    assert np.abs(merged - pixels("unmerged/base.png")[20:]).max() > 20


def test_apply_refuses_another_base(files, capsys):
    tensors, metadata = load_safetensors(files / "model.safetensors")
    save_safetensors(files / "other.safetensors", {n: t + 0.001 for n, t in tensors.items()}, metadata)
    before = files_in(files)
    assert command("lora apply other.safetensors style.safetensors out.safetensors") == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert files_in(files) == before
    assert command("lora apply other.safetensors style.safetensors out.safetensors --allow_other_base") == 0


def test_extract_finds_the_update_again(files, capsys):
    assert command("lora apply model.safetensors style.safetensors styled.safetensors") == 0
    assert command("lora extract styled.safetensors model.safetensors found.safetensors --energy 0.99999") == 0
    assert "discarded energy" in capsys.readouterr().out
    found, given = read_lora(files / "found.safetensors"), read_lora(files / "style.safetensors")
    assert found.modules.keys() == given.modules.keys()
    assert found.base_hash == given.base_hash
    for name, module in given.modules.items():
        assert found.modules[name].rank <= 2
        assert relative(found.modules[name].delta(), module.delta()) < 1e-2
    tensors, metadata = load_safetensors(files / "styled.safetensors")
    bias = next(name for name in tensors if name.endswith(".bias"))
    save_safetensors(files / "styled.safetensors", tensors | {bias: tensors[bias] + 1}, metadata)
    assert command("lora extract styled.safetensors model.safetensors one.safetensors --rank 1") == 0
    assert f"such as {bias}" in capsys.readouterr().out
    assert {f.rank for f in read_lora(files / "one.safetensors").modules.values()} == {1}
    assert command("lora extract model.safetensors model.safetensors none.safetensors --rank 1") == 2


def test_extract_and_resize_name_what_is_not_finite(files, capsys):
    for name in ("model", "style"):
        tensors, metadata = load_safetensors(files / f"{name}.safetensors")
        last = max(name for name in tensors if name.endswith((".lora_A", "attn1.to_q.weight")))
        save_safetensors(files / "odd.safetensors", tensors | {last: torch.full_like(tensors[last], torch.nan)}, metadata)
        words = "extract odd.safetensors model.safetensors" if name == "model" else "resize odd.safetensors"
        assert command(f"lora {words} out.safetensors --rank 1") == 2
        assert last.removesuffix(".lora_A") in capsys.readouterr().err


# --- DoRA ---


def test_dora_folds_and_does_not_merge(work_folder, capsys):
    """W' = m (W + s B A) / |W + s B A| of [DoRA]; half of it is half-way from W."""
    from xdiffusion.commands.base_weights import folded_weight

    weight, plain = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), factors((6, 4))
    dora = replace(plain, magnitude=torch.arange(1.0, 7.0))
    sum_ = weight + plain.delta()
    exact = dora.magnitude[:, None] * sum_ / sum_.norm(dim=1, keepdim=True)
    assert torch.allclose(folded_weight(weight, dora, 1.0), exact, atol=1e-6)
    assert torch.allclose(folded_weight(weight, dora, 0.5), (weight + exact) / 2, atol=1e-6)
    write_lora(LoRAFile({"layer": dora}), work_folder / "dora.safetensors", "native")
    assert command("lora resize dora.safetensors out.safetensors --rank 1") == 2
    assert "layer is DoRA" in capsys.readouterr().err


# --- mistakes ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora inspect missing.safetensors", "no LoRA at missing"),
        ("lora inspect model.safetensors", "model.safetensors"),
        ("lora convert style.safetensors out.safetensors --to lycoris", "lycoris"),
        ("lora convert style.safetensors out.safetensors --to kohya --base sd99", "sd99"),
        ("lora merge style.safetensors:x ink.safetensors out.safetensors", "must be a number"),
        ("lora merge style.safetensors ink.safetensors out.safetensors --method svd", "a rank or an energy"),
        ("lora merge style.safetensors ink.safetensors out.safetensors --rank 2", "no other method"),
        ("lora merge style.safetensors sd_ink.safetensors out.safetensors --method legacy", "different models"),
        ("lora apply model.safetensors sd_ink.safetensors out.safetensors", "does not fit"),
        ("lora apply style.safetensors style.safetensors out.safetensors", "neither a model of this project"),
        ("lora apply missing.safetensors style.safetensors out.safetensors", "no checkpoint at missing"),
        ("lora extract model.safetensors style.safetensors out.safetensors --rank 2", "neither a model"),
        ("lora_add stabilityai/sd2 style.safetensors out 1 upl", "has to be downloaded"),
        ("lora_add . style.safetensors out 1 upl", "holds no unet"),
        (
            "lora_add model.safetensors style.safetensors out.ckpt 1 upl-ckpt-v2",
            "kind=identity: original knows kl",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(files, capsys, line, message):
    before = files_in(files)
    assert command(line) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "written" not in out
    assert files_in(files) == before


@pytest.mark.parametrize(
    "line",
    [
        "lora",
        "lora convert a b",
        "lora resize a b",
        "lora resize a b --rank 1 --energy 0.5",
        "lora resize a b --energy 1.5",
        "lora merge a b --rank 0",
        "lora_add a b",
        "lora_add a b c d",
        "lora_add a b c 0.5 mean",
        "lora_add a b c 0.5 lpl more",
        "lora_add a b c --path_1 d",
        "lora_add a b c --legacy --rank 2",
        "lora_add a b c --mode upl --rank 2",
    ],
)
def test_words_that_are_no_command_are_refused(line, capsys):
    assert command(line) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.endswith(" (--help lists the flags)\n") and err.count("\n") == 1


# --- sampling ---


def test_sampling_with_the_loras_folded_draws_the_same_pictures(files):
    words = ["--checkpoint", "model.safetensors", *SAMPLING, "--save_trajectory"]
    words += ["--lora_path", "style.safetensors:0.7", "--lora_path", "ink.safetensors:0.3", "--output_path"]
    assert run_script(SAMPLE, *words, "apart") == 0
    assert run_script(SAMPLE, *words, "folded", "--lora_merge") == 0
    for name in ("base.png", "lora.png", "paired.png"):
        assert np.abs(pixels(f"apart/{name}") - pixels(f"folded/{name}")).max() <= 1
    assert np.abs(pixels("apart/base.png")[20:] - pixels("apart/lora.png")[20:]).max() > 20
    assert run_script(SAMPLE, "--checkpoint", "model.safetensors", "--lora_merge") == 2


# --- the quick reference ---


def test_every_command_of_the_quick_reference_runs(files):
    text = (ROOT / "docs/lora-quick-reference.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 15
    for line in lines:
        name, *words = shlex.split(line)
        if name == "python":
            assert run_script(words[0], *words[1:], *SAMPLING, "--output_path", "pictures") == 0, line
        else:
            assert command(line) == 0, line
    flags = {flag for line in lines for flag in re.findall(r"--\w+", line)}
    assert {
        "--method",
        "--rank",
        "--energy",
        "--to",
        "--base",
        "--mode",
        "--alpha",
        "--legacy",
        "--lora_merge",
    } <= flags
