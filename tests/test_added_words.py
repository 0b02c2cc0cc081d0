"""Words in the vocabulary of a diffusers folder: no command loses them, and none trains them."""

import json
import shutil

import pytest
import torch
from sd_files import sd_config, write_native

from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.checkpoints.writing import save_safetensors
from xdiffusion.cli import run
from xdiffusion.commands import lora, lora_add, sd
from xdiffusion.loading import load_model

NAME = "sd15_tiny"
TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture
def folder(work_folder, generator):
    """A model as `native.safetensors`, and as `folder` with two words of its own, <cat> of two vectors and toy."""
    write_native(NAME, work_folder / "native.safetensors")
    sd.main(["convert", "native.safetensors", "plain", "--to", "diffusers"])
    shutil.copytree("plain", "folder")
    weights = work_folder / "folder/text_encoder/model.safetensors"
    tensors = dict(StoredTensors(weights))
    rows = torch.randn(4, tensors[TABLE].shape[1], generator=generator)
    save_safetensors(weights, tensors | {TABLE: torch.cat([tensors[TABLE], rows])}, {"format": "pt"})
    ids = {"<cat>": 49408, "<cat>_1": 49409, "toy": 49410}
    (work_folder / "folder/tokenizer/added_tokens.json").write_text(json.dumps(ids))
    return work_folder / "folder"


@pytest.fixture
def words(folder):
    return load_model_file(folder).words


def test_the_model_is_that_without_words_and_has_the_words(folder, words):
    assert {name: len(rows) for name, rows in words.items()} == {"<cat>": 2, "toy": 1}
    exact = load_model(folder.with_name("native.safetensors"))[0].state_dict()
    model, _ = load_model(folder)
    tensors = model.state_dict()
    assert torch.equal(tensors.pop("text_encoder.learned_embedding"), torch.cat([*words.values()]))
    assert tensors.keys() == exact.keys() and all(torch.equal(tensor, exact[n]) for n, tensor in tensors.items())


@pytest.mark.parametrize("layout", ["native", "original", "diffusers"])
def test_another_layout_has_them_beside_it(layout, words, folder, capsys):
    output = folder.with_name("out" if layout == "diffusers" else "out.safetensors")
    assert run(sd.main, ["convert", str(folder), str(output), "--to", layout]) == 0
    assert "2 learned words, <cat>, toy; sample.py takes them as --learned_tokens" in capsys.readouterr().out
    assert_equal(read_learned_tokens(output.with_name("out.ti.pt")), words)
    assert not load_model_file(output).words
    again = folder.with_name("again.safetensors")
    assert run(sd.main, ["convert", str(output), str(again), "--to", "native"]) == 0
    assert_equal(read_learned_tokens(again.with_name("again.ti.pt")), words)


def assert_equal(words, others):
    assert words.keys() == others.keys() and all(torch.equal(words[name], rows) for name, rows in others.items())


def test_an_extracted_lora_brings_them(words, folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = {n: t.clone() for n, t in StoredTensors(weights).items()}
    tensors["conv_in.weight"] += 1
    save_safetensors(weights, tensors, {"format": "pt"})
    assert run(lora.main, ["extract", "folder", "plain", "lora.safetensors", "--rank", "1"]) == 0
    found = read_lora(folder.with_name("lora.safetensors"))
    assert [*found.modules] == ["unet.conv_in"]
    assert_equal(found.tokens, words)
    for base in ("folder", "plain"):
        assert run(lora_add.main, [base, "lora.safetensors", f"{base}.out.safetensors", "1", "--mode", "upl-ckpt-v2"]) == 0
        assert_equal(read_learned_tokens(folder.with_name(f"{base}.out.ti.pt")), words)


def test_a_training_says_that_it_has_none_of_them(folder, work_folder, capsys):
    from training.image.train import base_file, parse

    config = sd_config(NAME)
    path = "configs/image/sd/sd15_lora_tiny.yaml"
    args = parse(["--config_path", path, "--use_lora_training", "--load_model_weights_from_checkpoint", "folder"])
    base_file(config, args, says=True)
    assert "folder: its words <cat>, toy are left out: a run has those that it learns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<cat>": "x"}, "added_tokens.json is damaged"),
        ("added_tokens.json", ["<cat>"], "added_tokens.json is damaged"),
        ("added_tokens.json", {"<cat>": 1e400}, "added_tokens.json is damaged"),
        ("added_tokens.json", {" ": 49408}, "a learned token needs a name"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {}}}, "tokenizer_config.json is damaged"),
        ("tokenizer.json", {"added_tokens": [7]}, "tokenizer.json is damaged"),
    ],
)
def test_damaged_names_are_one_error(file, content, message, folder):
    (folder / "tokenizer" / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_rows_without_a_name_are_none(folder):
    (folder / "tokenizer/added_tokens.json").unlink()
    model, _ = load_model(folder)
    assert model.text_encoder.learned_ids == {}


def test_of_two_words_that_differ_in_capitals_the_last_is_taken(folder, words):
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<Cat>": 49408, "<cat>": 49410}))
    model, _ = load_model(folder)
    assert torch.equal(model.text_encoder.learned_tokens()["<cat>"], words["toy"])


def test_a_folded_folder_keeps_its_words_and_others_get_other_names(folder, words):
    """Those of the same name and vectors are there already."""
    factors = LoRAFactors(torch.ones(1, 36), torch.ones(16, 1), 1.0)
    tokens = {"toy": words["toy"], "<cat>": 2 * words["<cat>"]}
    write_lora(LoRAFile({"unet.conv_in": factors}, tokens=tokens), "lora.safetensors", "native")
    assert run(lora_add.main, ["folder", "lora.safetensors", "out", "1", "--mode", "upl"]) == 0
    assert_equal(load_model_file(folder.with_name("out")).words, words)
    assert_equal(read_learned_tokens(folder.with_name("out.ti.pt")), {"<cat-2>": tokens["<cat>"]})
