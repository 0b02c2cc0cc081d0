"""Files of learned tokens: every form that is read, and what is refused."""

import pytest
import torch
from lora_cases import command
from lora_files import random_factors
from safetensors.torch import save_file
from sd_files import OfAMac

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.learned_tokens import parse_tokens_spec, read_learned_tokens, save_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora

ROWS = torch.arange(8.0).view(2, 4)


def write(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("learned_embeds.safetensors", {"<cat>": ROWS[0].clone()}, {"<cat>": ROWS[:1]}),
        ("learned_embeds.safetensors", {"<cat>": ROWS, "<dog>": ROWS + 1}, {"<cat>": ROWS, "<dog>": ROWS + 1}),
        ("learned_embeds.bin", {"<cat>": ROWS[0]}, {"<cat>": ROWS[:1]}),
        (
            "x.pt",
            {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "ink"},
            {"x": ROWS, "ink": ROWS},
        ),
        ("ink.pt", {"string_to_param": {"*": torch.nn.Parameter(ROWS)}, "step": 3}, {"ink": ROWS}),
        ("ink.pt", {"string_to_param": {"*": OfAMac(ROWS)}, "step": 3}, {"ink": ROWS}),
        ("ink.pt", {"string_to_param": {"*": OfAMac(ROWS.half())}, "step": 3}, {"ink": ROWS}),
        ("ink.safetensors", {"emb_params": ROWS}, {"ink": ROWS}),
        ("ink.safetensors", {"clip_l": ROWS}, {"ink": ROWS}),
        ("ink.safetensors", {"clip_h": ROWS}, {"ink": ROWS}),
        ("ink.safetensors", {"emp_params": ROWS, "emp_params_out": ROWS + 1}, {"ink": ROWS}),
        ("ink.safetensors", {"text_encoders_0": ROWS}, {"ink": ROWS}),
        ("ink.safetensors", {"emb_params": ROWS.to(torch.float8_e4m3fn)}, {"ink": ROWS}),
    ],
)
def test_forms(name, content, expected, tmp_path):
    tokens = read_learned_tokens(write(tmp_path / name, content))
    assert tokens.keys() == expected.keys()
    assert all(torch.equal(tokens[token], rows) for token, rows in expected.items())
    assert not any(rows.requires_grad for rows in tokens.values())


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds.safetensors"])
def test_a_concept_s_folder_stands_for_its_file(name, tmp_path):
    write(tmp_path / name, {"<cat>": ROWS})
    assert torch.equal(read_learned_tokens(tmp_path)["<cat>"], ROWS)


def test_a_file_that_is_not_there_is_told_with_those_of_a_like_name(tmp_path):
    write(tmp_path / "inky.safetensors", {"<cat>": ROWS})
    with pytest.raises(CheckpointError, match=r"no file of learned words at .*ink\.safetensors.*inky\.safetensors"):
        read_learned_tokens(tmp_path / "ink.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_learned_tokens(tmp_path)


def test_what_is_written_is_read_and_may_be_renamed(tmp_path):
    save_learned_tokens(tmp_path / "a.safetensors", {"<cat>": ROWS})
    assert torch.equal(read_learned_tokens(tmp_path / "a.safetensors")["<cat>"], ROWS)
    assert list(read_learned_tokens(tmp_path / "a.safetensors", "<fox>")) == ["<fox>"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", [1, 2], "holds no learned tokens"),
        ("a.pt", {}, "holds no learned tokens"),
        ("a.pt", {"step": 3}, "holds no learned tokens"),
        ("a.safetensors", {"<a>": torch.zeros(2, 2, 2)}, "'<a>' is no learned token, it has shape"),
        ("a.safetensors", {"<a>": torch.full((4,), torch.nan)}, "'<a>' is not finite"),
        ("a.safetensors", {"<a>": torch.zeros(4, dtype=torch.int64)}, "'<a>' is no learned token"),
        ("a.safetensors", {"clip_l": ROWS, "clip_g": ROWS + 1}, "Stable Diffusion XL"),
        ("a.safetensors", {"clip_g": ROWS}, "Stable Diffusion XL"),
    ],
)
def test_other_files_are_refused(name, content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_learned_tokens(write(tmp_path / name, content))


def test_a_name_is_for_a_file_of_one_token(tmp_path):
    path = write(tmp_path / "x.pt", {"string_to_param": {"*": ROWS}, "name": "ink"})
    assert list(read_learned_tokens(path, "<c>")) == ["<c>"]
    path = write(tmp_path / "a.safetensors", {"<a>": ROWS, "<b>": ROWS + 1})
    with pytest.raises(CheckpointError, match=r"holds 2 tokens .*cannot be named '<c>'"):
        read_learned_tokens(path, "<c>")
    with pytest.raises(CheckpointError, match="no file of learned words at"):
        read_learned_tokens(tmp_path / "b.safetensors")


def test_names_on_a_command_line(tmp_path):
    odd = tmp_path / "a=b.pt"
    odd.touch()
    for text, expected in [("e.pt", ("e.pt", None)), ("e.pt=<cat>", ("e.pt", "<cat>")), (str(odd), (str(odd), None))]:
        path, name = parse_tokens_spec(text)
        assert (str(path), name) == expected


def test_words_that_a_lora_format_has_no_place_for_are_told_with_their_file(work_folder, capsys):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = LoRAFile({layer: random_factors(layer, 2, 2.0)}, tokens={"<s1>": torch.ones(768)})
    write_lora(lora, work_folder / "words.safetensors", "native")
    assert command("lora convert words.safetensors kohya.safetensors --to kohya --base sd15") == 0
    told = "kohya.ti.pt: its learned words <s1>, for which kohya has no place\n"
    assert told in capsys.readouterr().out and (work_folder / "kohya.ti.pt").is_file()
