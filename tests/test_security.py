"""Files from strangers, attack by attack: none runs code, leaves its folder, or takes more than its size lets expect.

`docs/security.md` says what is promised. `tests/fuzz_readers.py` damages 10,000 files per reader; here a few of each.
"""

import io
import json
import os
import pickle
import random
import re
import runpy
import subprocess
from functools import partial

import pytest
import torch
from commands import ROOT, SAMPLE, run_script
from damage import mutated
from fake_sets import write_cifar10
from hostile_files import READERS, write_changed_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny import SMALLEST

from xdiffusion.build import load_config
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.native import load_model_file
from xdiffusion.checkpoints.reading import load_pickled
from xdiffusion.config_files import ConfigError, parse_overrides
from xdiffusion.data.image_files import DamagedImage, Picture
from xdiffusion.data.torchvision_sets import DatasetUnavailable, load_cifar10
from xdiffusion.loading import load_model
from xdiffusion.pictures import save_png
from xdiffusion.training.state import whole_state

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4"))


class Touches:
    """Unpickled by the plain unpickler, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


# --- any damage ---


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """The folder of a reader's whole file, written once, and the file's bytes."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("whole")
            READERS[name].write(folder)
            READERS[name].read(folder)
            folders[name] = folder, (folder / READERS[name].damaged).read_bytes()
        return folders[name]

    return folder_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_read_or_is_a_value_error(name, seed, whole_folder):
    folder, content = whole_folder(name)
    (folder / READERS[name].damaged).write_bytes(mutated(content, random.Random(seed)))
    try:
        READERS[name].read(folder)
    except ValueError as error:
        assert READERS[name].is_named(error, folder)


# --- code ---


def test_nothing_here_unpickles():
    """Neither Python's unpickler nor torch's: `checkpoints/pickles.py` reads pickles as data."""
    sources = [p for folder in ("xdiffusion", "training", "sampling") for p in (ROOT / folder).rglob("*.py")]
    calls = re.compile(r"torch\.load\(|pickle\.(loads?|_?Unpickler)\b|allow_pickle|torch\.jit\.load")
    assert [str(p) for p in sources if calls.search(p.read_text())] == []


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin"])
def test_code_in_a_checkpoint_is_not_run(name, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1), "b": Touches(tmp_path / "made")}}, tmp_path / name)
    for read in (load_model_file, load_pickled, read_learned_tokens):
        with pytest.raises(CheckpointError, match="not a torch file of plain weights"):
            read(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_code_in_a_trainer_state_is_not_run(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion-1.safetensors")
    torch.save({"hash": "", "step": Touches(tmp_path / "made")}, tmp_path / "diffusion-1.state.pt")
    with pytest.raises(CheckpointError, match="plain weights"):
        whole_state(tmp_path / "diffusion-1.safetensors")
    assert not (tmp_path / "made").exists()


def test_code_in_a_data_set_is_not_run(tmp_path):
    """torchvision unpickles CIFAR-10's files; it looks at their checksums first."""
    write_cifar10(tmp_path)
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        file.write_bytes(pickle.dumps(Touches(tmp_path / "made")))
    with pytest.raises(DatasetUnavailable):
        load_cifar10(32, str(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("tag", ["python/object/apply:os.system ['true']", "python/name:os.system", "python/module:os"])
def test_a_tag_in_a_config_is_refused(tag, tmp_path):
    (tmp_path / "a.yaml").write_text(f"{SMALLEST}training: !!{tag}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["passwd", "secret.yaml"])
def test_what_is_in_a_file_that_a_config_names_as_its_base_is_not_told(name, tmp_path):
    (tmp_path / name).write_text("root:x:0:0:hunter2:/root\n")
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path / name}\n")
    with pytest.raises(ConfigError, match=r"must be the path of a \.yaml file|must hold a mapping") as error:
        load_config(tmp_path / "a.yaml")
    assert "hunter2" not in str(error.value)


def test_a_picture_of_a_format_that_needs_another_program_is_not_opened(monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file's ending is."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was run"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DamagedImage, match="no known image format"):
        Picture("a.png", None, partial(io.BytesIO, eps)).pixels()


# --- what is not theirs to read or write ---

ENVIRONMENT = "${oc.env:XDIFFUSION_SECRET}"


@pytest.mark.parametrize("spelling", [f"'{ENVIRONMENT}'", '"\\x24{oc.env:XDIFFUSION_SECRET}"', f"'\\{ENVIRONMENT}'"])
def test_a_config_cannot_read_the_environment(spelling, tmp_path, monkeypatch):
    monkeypatch.setenv("XDIFFUSION_SECRET", "hunter2")
    (tmp_path / "a.yaml").write_text(f"{SMALLEST}sampling: {{negative_prompt: {spelling}}}\n")
    with pytest.raises(ConfigError, match=r"line 3: .*nothing in it is replaced") as error:
        load_config(tmp_path / "a.yaml")
    assert "hunter2" not in str(error.value)


def test_a_base_or_an_override_cannot_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDIFFUSION_SECRET", "hunter2")
    (tmp_path / "a.yaml").write_text(f"base: '{ENVIRONMENT}'\n")
    for read in (lambda: load_config(tmp_path / "a.yaml"), lambda: parse_overrides([f"data.kind={ENVIRONMENT}"])):
        with pytest.raises(ConfigError, match="nothing in it is replaced") as error:
            read()
        assert "hunter2" not in str(error.value)


def test_the_config_in_a_checkpoint_cannot_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDIFFUSION_SECRET", "hunter2")
    path = write_changed_model(tmp_path / "a.safetensors", **{"sampling.negative_prompt": ENVIRONMENT})
    with pytest.raises(ConfigError, match=r"a\.safetensors: sampling\.negative_prompt=.*nothing in it is replaced"):
        load_model(path)


@pytest.mark.parametrize("flag", [["--output_path", "{}"], ["--output_path={}"], ["--output_pat", "{}"]])
def test_a_recipe_does_not_choose_where_files_go(flag, tmp_path, capsys):
    words = ["--checkpoint", str(write_changed_model(tmp_path / "a.safetensors")), "--force_cpu", "--num_samples", "1"]
    words += [word.format(tmp_path / "elsewhere") for word in flag]
    save_png(Image.new("L", (4, 4)), tmp_path / "a.png", {"command": json.dumps(words)})
    status = run_script(SAMPLE, "--from_png", tmp_path / "a.png", "--output_path", tmp_path / "here")
    assert status == (2 if flag[0] == "--output_pat" else 0)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("command", ["[" * 100_000, '"--seed"', "{}", "[1]", "nonsense"])
def test_a_recipe_that_is_none_is_named(command, tmp_path, capsys):
    save_png(Image.new("L", (4, 4)), tmp_path / "a.png", {"command": command})
    sample = runpy.run_path(str(ROOT / SAMPLE))
    with pytest.raises(ValueError, match=r"a\.png does not say how it was drawn"):
        sample["with_recipe"](["--from_png", str(tmp_path / "a.png")])
