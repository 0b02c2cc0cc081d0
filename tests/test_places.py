"""Where samples go, by the name of what drew them."""

from pathlib import Path

import pytest

from xdiffusion.places import nothing_at, sample_folder
from xdiffusion.training.records import run_name

RUN = "output/image/digits/tiny/diffusion-10.safetensors"


@pytest.mark.parametrize(
    ("checkpoint", "config_path", "ours", "name"),
    [
        (RUN, None, True, "tiny"),
        (RUN, "configs/large.v2.yaml", True, "large.v2"),
        ("run/merged.safetensors", None, True, "run"),
        ("run/merged.safetensors", None, False, "merged"),
        ("models/a.safetensors", None, True, "a"),
        ("models/diffusion-x.safetensors", "configs/large.yaml", True, "diffusion-x"),
        ("models/v1.5.safetensors", None, False, "v1.5"),
        ("models/v1.5.safetensors", "configs/large.yaml", False, "v1.5"),
        ("models/sd.v2", None, False, "sd.v2"),  # a folder's name has no ending
    ],
)
def test_samples_are_called_after_the_run_the_config_the_file_or_the_folder(checkpoint, config_path, ours, name, tmp_path):
    (tmp_path / "models/sd.v2").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").touch()
    folder = sample_folder("image/digits", tmp_path / checkpoint, config_path, ours=ours)
    assert folder.as_posix() == f"output/image/digits/sample/{name}"


@pytest.mark.parametrize("checkpoint", ["../diffusion-10.safetensors", "../../tiny/diffusion-10.safetensors"])
def test_two_dots_are_no_name(checkpoint, tmp_path, monkeypatch):
    """The samples of all runs would lie in one folder, beside those of the others."""
    (tmp_path / "tiny/p").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny/p")
    assert sample_folder("image/digits", Path(checkpoint), None, ours=True).as_posix() == "output/image/digits/sample/tiny"
    assert run_name(Path("..")) == "tiny"


def test_an_ending_alone_makes_no_file_the_one_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mkdocs.yml", "mnist.yaml", "mnist.yml"):
        (tmp_path / name).touch()
    assert (
        nothing_at(Path("nope.yaml"), "config", (".yaml", ".yml"))
        == f"no config at nope.yaml (in the working folder {tmp_path})"
    )
    assert "; there are: mnist.yaml, mnist.yml" in nothing_at(Path("mnits.yaml"), "config", (".yaml", ".yml"))
