"""`lora COMMAND ... OUT`, and `lora_add`: no file that is read is overwritten, and a forgotten OUT is noticed."""

import json

import pytest
import torch
from commands import files_in
from lora_cases import command, write_files
from safetensors.torch import save_file

from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.checkpoints.reading import load_safetensors


@pytest.fixture
def files(tiny_run, work_folder):
    """The current folder, with the files of `write_files` in it."""
    write_files(tiny_run, work_folder)
    return work_folder


MISSING = "OUT is missing?"
READ = "would be overwritten"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora merge style.safetensors ink.safetensors", MISSING),
        ("lora merge style.safetensors:0.7 ink.safetensors", MISSING),
        ("lora merge style.safetensors:0.7 ink.safetensors:0.3", MISSING),
        ("lora merge style.safetensors model.safetensors ink.safetensors", MISSING),
        ("lora merge style.safetensors ink.safetensors none.safetensors:-1e-1", MISSING),
        ("lora merge style.safetensors ink.safetensors style.safetensors", READ),
        ("lora merge style.safetensors:0.7 ink.safetensors:0.3 ./ink.safetensors", READ),
        ("lora resize style.safetensors style.safetensors --rank 1", READ),
        ("lora resize style.safetensors link.safetensors --rank 1", READ),
        ("lora resize style.pt style.safetensors --rank 1", READ),
        ("lora convert style.safetensors style.safetensors --to kohya", READ),
        ("lora apply model.safetensors style.safetensors model.safetensors", READ),
        ("lora apply model.safetensors style.safetensors:0.5 style.safetensors", READ),
        ("lora extract model.safetensors style.safetensors style.safetensors --rank 1", READ),
        ("lora_add style.safetensors ink.safetensors ink.safetensors 0.5", READ),
        ("lora_add model.safetensors style.safetensors model.safetensors 1 upl", READ),
    ],
)
def test_a_file_that_is_read_is_not_overwritten(files, capsys, line, said):
    (files / "link.safetensors").symlink_to("style.safetensors")
    before = {name: (files / name).read_bytes() for name in files_in(files)}
    assert command(line) == 2
    assert said in capsys.readouterr().err
    assert {name: (files / name).read_bytes() for name in files_in(files)} == before


def test_an_earlier_result_is_overwritten(files):
    for weight in (0.5, 0.6):
        assert command(f"lora merge style.safetensors:{weight} ink.safetensors out.safetensors --overwrite") == 0
        assert command("lora resize style.safetensors small.safetensors --rank 1") == 0


def test_one_lora_is_scaled_into_a_new_file(files):
    assert command("lora merge style.safetensors:0.5 half.safetensors") == 0
    assert (files / "half.safetensors").is_file()


def dtypes(path) -> set[torch.dtype]:
    return {f.lora_A.dtype for f in read_lora(path).modules.values()}


def test_the_default_dtype_is_the_one_of_the_help(files, capsys):
    assert command("lora convert style.safetensors half.safetensors --to native --dtype float16") == 0
    lines = {
        "convert": "half.safetensors out.safetensors --to native",
        "merge": "half.safetensors half.safetensors out.safetensors",
        "resize": "half.safetensors out.safetensors --rank 1",
        "extract": "model.safetensors tuned.safetensors out.safetensors --rank 1",
    }
    assert command("lora apply model.safetensors half.safetensors tuned.safetensors") == 0
    for name, words in lines.items():
        (files / "out.safetensors").unlink(missing_ok=True)
        assert command(f"lora {name} {words}") == 0
        capsys.readouterr()
        assert command(f"lora {name} --help") == 0
        says_float32 = "default: float32" in " ".join(capsys.readouterr().out.split())
        assert dtypes("out.safetensors") == {torch.float32 if says_float32 else torch.float16}, name


def test_words_beside_what_is_read_and_files_beside_what_is_written_stay(files, capsys):
    words = {"<s1>": torch.ones(8)}
    for name in ("style", "ink"):
        torch.save(words, files / f"{name}.ti.pt")
    before = {name: (files / name).read_bytes() for name in files_in(files)}
    for line, said in (
        ("lora merge ink.safetensors:0.5 style.safetensors:0.5 style.pt", READ),
        ("lora apply model.safetensors ink.safetensors ink.pt", READ),
        ("lora_add ink.safetensors style.safetensors style.pt 0.5", READ),
        ("lora inspect style.safetensors --plot style.safetensors", READ),
    ):
        assert command(line) == 2
        assert said in capsys.readouterr().err
    (files / "both.text_encoder.pt").write_bytes(b"another")
    assert command("lora merge ink.safetensors:0.5 style.safetensors:0.5 both.pt") == 2
    assert "both.text_encoder.pt is there already; --overwrite replaces it" in capsys.readouterr().err
    assert {name: (files / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", ["both-v1.5", "both", "both.safetensors"])
def test_a_merge_is_written_in_the_first_file_s_format_whatever_its_name(files, name):
    assert command("lora convert sd_style.safetensors a.safetensors --to kohya") == 0
    assert command(f"lora merge a.safetensors:0.5 sd_ink.safetensors:0.5 {name}") == 0
    assert read_lora(files / name).format == "kohya"


def test_a_merge_of_pefts_folder_into_a_file_is_one_that_other_programs_know(files):
    assert command("lora convert sd_style.safetensors folder --to peft") == 0
    assert command("lora merge folder:0.5 one.safetensors") == 0
    assert read_lora(files / "one.safetensors").format == "diffusers"


def test_what_was_folded_in_before_stays_in_the_header(files):
    assert command("lora apply model.safetensors style.safetensors once.safetensors") == 0
    assert command("lora apply once.safetensors ink.safetensors:0.5 twice.safetensors --allow_other_base") == 0
    header = load_safetensors(files / "twice.safetensors")[1]
    assert header["folded_lora"] == "style.safetensors:1, ink.safetensors:0.5"


def test_what_is_not_finite_is_told_and_is_json_all_the_same(files, capsys):
    tensors, header = load_safetensors(files / "style.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    next(tensor for name, tensor in tensors.items() if name.endswith("lora_B"))[0] = torch.nan
    save_file(tensors, files / "odd.safetensors", header)
    assert command("lora inspect odd.safetensors") == 0
    assert "the factors of 1 modules are not finite, such as " in capsys.readouterr().out
    assert command("lora inspect odd.safetensors --json") == 0
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [module["delta"] for module in said["modules"].values()].count(None) == 1
