"""What folding a LoRA into a model does beside the sum of weights: its learned words, and whether it is of this base."""

from dataclasses import replace

import pytest
import torch
from commands import SAMPLE, files_in, run_script
from lora_cases import command, factors
from sd_files import write_native

from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.commands import sd
from xdiffusion.lora.base_identity import sample_of

LAYER = "network.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
FOLDS = {
    "apply": "lora apply model.safetensors {lora} {out}.safetensors",
    "upl": "lora_add model.safetensors {lora} {out}.safetensors 1.0 upl",
    "upl of a folder": "lora_add folder-1.5 {lora} {out} 1.0 upl",
    "upl-ckpt-v2": "lora_add model.safetensors {lora} {out}.safetensors 1.0 upl-ckpt-v2",
}


@pytest.fixture
def lora():
    """Of the base in the current folder, with two learned words."""
    return LoRAFile({LAYER: factors((32, 32))}, tokens={"<s1>": torch.ones(16), "<s2>": torch.eye(16)[:2]})


@pytest.fixture
def files(lora, work_folder):
    """The current folder: a tiny Stable Diffusion as model.safetensors and folder-1.5, and style.safetensors, a LoRA of it."""
    write_native("sd15_tiny", work_folder / "model.safetensors")
    sd.main(["convert", "model.safetensors", "folder-1.5", "--to", "diffusers"])
    write_lora(lora, work_folder / "style.safetensors", "native")
    return work_folder


def words_in(path) -> dict[str, list]:
    return {word: rows.tolist() for word, rows in read_learned_tokens(path).items()}


@pytest.mark.parametrize("line", FOLDS.values(), ids=FOLDS)
def test_learned_words_are_written_beside_the_model_and_draw(line, files, lora, capsys):
    assert command(line.format(lora="style.safetensors", out="out-1.5")) == 0
    said = capsys.readouterr().out
    assert "out-1.5.ti.pt: 2 learned words, <s1>, <s2>; sample.py takes them as --learned_tokens out-1.5.ti.pt" in said
    assert words_in(files / "out-1.5.ti.pt") == {"<s1>": [[1.0] * 16], "<s2>": torch.eye(16)[:2].tolist()}
    model = "out-1.5" if "folder" in line else "out-1.5.safetensors"
    words = ["--checkpoint", model, "--learned_tokens", "out-1.5.ti.pt", "--prompt", "a <s1>", "--sampling_steps", 1]
    assert run_script(SAMPLE, *words, "--output_path", "pictures") == 0
    assert (files / "pictures/samples.png").is_file()


@pytest.mark.parametrize("line", FOLDS.values(), ids=FOLDS)
def test_a_lora_without_words_writes_none_and_takes_no_file_of_others(line, files, lora, capsys):
    write_lora(replace(lora, tokens={}), files / "plain.safetensors", "native")
    assert command(line.format(lora="plain.safetensors", out="out")) == 0
    assert "learned" not in capsys.readouterr().out
    assert not (files / "out.ti.pt").exists()
    torch.save({"<old>": torch.ones(16)}, files / "two.ti.pt")
    before = files_in(files)
    assert command(line.format(lora="plain.safetensors", out="two")) == 2
    assert "two.ti.pt of another LoRA would be read with" in capsys.readouterr().err
    assert files_in(files) == before


def test_a_second_lora_joins_the_words_of_the_first(files, lora, capsys):
    """As when they are merged: a name that stands for another vector gets a number."""
    write_lora(replace(lora, tokens={"<s1>": 2 * torch.ones(16)}), files / "ink.safetensors", "native")
    assert command("lora apply model.safetensors style.safetensors one.safetensors") == 0
    for line in (
        "lora apply {}.safetensors ink.safetensors {}.safetensors",
        "lora_add {}.safetensors ink.safetensors {}.ckpt 1 upl-ckpt-v2",
    ):
        capsys.readouterr()
        assert command(line.format("one", "two")) == 0
        out, err = capsys.readouterr()
        assert "two.ti.pt: 3 learned words, <s1>, <s2>, <s1-2>" in out
        assert "<s1> of ink.safetensors is called <s1-2>" in err
        assert words_in(files / "two.ti.pt") == words_in(files / "one.ti.pt") | {"<s1-2>": [[2.0] * 16]}
        (files / "two.ti.pt").unlink()


@pytest.fixture
def other(files, lora):
    """Another model beside the base, in the same forms, and known.safetensors, a LoRA that names its base."""
    tensors, metadata = load_safetensors(files / "model.safetensors")
    save_safetensors(files / "other.safetensors", {n: 1.1 * t for n, t in tensors.items()}, metadata)
    sd.main(["convert", "other.safetensors", "other", "--to", "diffusers"])
    sample = sample_of({LAYER: tensors[f"{LAYER}.weight"]})
    known = replace(lora, base_hash=content_hash(tensors), base_sample=sample)
    write_lora(known, files / "known.safetensors", "native")
    return files


@pytest.mark.parametrize(
    ("base", "foreign", "mode"),
    [
        ("model.safetensors", "other.safetensors", "upl"),
        ("folder-1.5", "other", "upl"),
        ("folder-1.5/unet", "other/unet", "upl"),
        ("model.safetensors", "other.safetensors", "upl-ckpt-v2"),
        ("folder-1.5", "other", "upl-ckpt-v2"),
    ],
)
def test_a_base_that_it_was_not_trained_on_is_refused(base, foreign, mode, other, capsys):
    before = files_in(other)
    line = f"lora_add {foreign} known.safetensors out.safetensors 1.0 {mode}"
    assert command(line) == 2
    err = capsys.readouterr().err
    assert "known.safetensors was trained on another base" in err and err.count("\n") == 1
    assert files_in(other) == before
    assert command(f"{line} --allow_other_base") == 0
    assert command(f"lora_add {base} known.safetensors mine.safetensors 1.0 {mode}") == 0
    assert "trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("words", ["lora apply {0} {1} {2}", "lora_add {0} {1} {2} 1.0 upl-ckpt-v2"])
def test_its_base_in_half_precision_is_said(words, other, capsys):
    sd.main(["convert", "model.safetensors", "half.safetensors", "--to", "native", "--dtype", "float16"])
    assert command(words.format("half.safetensors", "known.safetensors", "out.safetensors")) == 0
    assert "known.safetensors: trained on these weights in another precision" in capsys.readouterr().err


def test_the_flag_is_for_folding(capsys):
    assert command("lora_add a b c --allow_other_base") == 2
    assert "--allow_other_base is for upl and upl-ckpt-v2" in capsys.readouterr().err
