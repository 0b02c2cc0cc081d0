"""Files that are there, and are not what they were named for: what they are is said, and what to do."""

import pytest
import torch
from commands import EVALUATE, SAMPLE, TRAIN, run_script, set_words
from lora_cases import command
from PIL import Image
from safetensors.torch import save_file
from sd_files import write_native

from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.learned_tokens import read_learned_tokens
from xdiffusion.checkpoints.lora_file import LoRAFactors, LoRAFile
from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file, lora_file
from xdiffusion.commands import sd
from xdiffusion.data.torchvision_sets import DatasetUnavailable, load_cifar10, load_mnist


def test_a_model_in_the_place_of_a_lora(tiny_run, work_folder, capsys):
    model = ["--checkpoint", tiny_run.checkpoint]
    said = f"error: {tiny_run.checkpoint} is a model, not a LoRA: sample.py takes it as --checkpoint\n"
    for script in (SAMPLE, EVALUATE):
        assert run_script(script, *model, "--lora_path", tiny_run.checkpoint) == 2
        assert capsys.readouterr().err == said
    assert command(f"lora inspect {tiny_run.checkpoint}") == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("layout", ["original", "diffusers", "native"])
def test_stable_diffusion_in_the_place_of_a_lora(work_folder, layout):
    write_native("sd15_tiny", work_folder / "model.safetensors")
    name = "folder" if layout == "diffusers" else "out.safetensors"
    sd.main(["convert", "model.safetensors", name, "--to", layout])
    with pytest.raises(CheckpointError, match=f"{name} is a model, not a LoRA"):
        lora_file(name)


@pytest.mark.parametrize("read", [load_model_file, read_lora, read_learned_tokens])
def test_what_is_no_torch_file_is_told_by_its_beginning(read, tmp_path):
    path = tmp_path / "a.pt"
    save_file({"<cat>": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt is no torch file but a safetensors file: name it a\.safetensors"):
        read(path)
    for start, what in {
        b"version https://git-lfs.github.com/spec/v1\noid": ".*a pointer of Git LFS, not the file",
        b"<!DOCTYPE html>": ".*a web page, not the file",
        b"nothing known": r"b'nothing k'$",
    }.items():
        for file, kind in ((path, "torch"), (path.with_suffix(".safetensors"), "safetensors")):
            file.write_bytes(start)
            with pytest.raises(CheckpointError, match=f"a{file.suffix} is no {kind} file: it begins with {what}"):
                read(file)
            file.unlink()


def test_a_state_that_a_new_run_has_set_aside_is_named(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--output_path", "run"]
    assert run_script(TRAIN, *words) == 0
    weights = (work_folder / "run/diffusion-2.safetensors").read_bytes()
    assert run_script(TRAIN, *words, "--num_training_steps", 1, "--save_and_sample_every_n", 1) == 0
    capsys.readouterr()
    resumed = [*words, "--num_training_steps", 3, "--resume_from", "run/diffusion-2.safetensors"]
    assert run_script(TRAIN, *resumed) == 2
    remedy = "rename diffusion-2.state.pt.earlier to diffusion-2.state.pt to go on from it"
    assert f"no file at run/diffusion-2.state.pt: a run begun anew has set it aside; {remedy}" in capsys.readouterr().err
    assert (work_folder / "run/diffusion-2.safetensors").read_bytes() == weights
    (work_folder / "run/diffusion-2.state.pt.earlier").rename("run/diffusion-2.state.pt")
    assert run_script(TRAIN, *resumed) == 0
    assert load_model_file(work_folder / "run/diffusion-3.safetensors").step == 3


@pytest.mark.parametrize(("load", "place"), [(load_mnist, "MNIST/raw"), (load_cifar10, "cifar-10-batches-py")])
def test_where_a_set_was_looked_for(tmp_path, load, place):
    with pytest.raises(DatasetUnavailable) as refusal:
        load(8, str(tmp_path))
    assert f"cannot be read from --data_dir {tmp_path}, in {tmp_path / place} (" in str(refusal.value)
    assert "download=True" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["image/folder", "image/shards", "image/mnist"])
def test_a_folder_of_pictures_that_is_not_there_was_looked_for_in_the_working_folder(kind, tiny_run, work_folder, capsys):
    """A config may name it, and be used from anywhere."""
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides)]
    assert run_script(TRAIN, *words, "--dataset_name", kind, *set_words(["data.data_dir=photos"])) == 2
    assert f" (in the working folder {work_folder})" in capsys.readouterr().err


def test_what_cannot_be_gone_on_from_says_what_can_be_named(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--resume_from"]
    for name in ("diffusion-2.safetensors", "diffusion-3.safetensors", "diffusion-3.state.pt"):
        (work_folder / name).write_bytes(tiny_run.checkpoint.read_bytes())
    assert run_script(TRAIN, *words, "diffusion-2.safetensors") == 2
    assert "no file at diffusion-2.state.pt, without which no run goes on; to begin a run with its weights alone, name " in (
        err := capsys.readouterr().err
    ) and err.endswith("diffusion-2.safetensors with --load_model_weights_from_checkpoint\n")
    assert run_script(TRAIN, *words, "diffusion-3.state.pt") == 2
    said = "diffusion-3.state.pt is the state of a run, not a checkpoint: name diffusion-3.safetensors, whose state this is"
    assert said in capsys.readouterr().err
    write_lora(LoRAFile({"a": LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}), work_folder / "a.safetensors", "native")
    assert run_script(TRAIN, *words, "a.safetensors") == 2
    assert "to go on training it, name it with --resume_from and --use_lora_training" in capsys.readouterr().err


def test_a_size_that_is_no_multiple_names_the_keys_to_set(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides)]
    (work_folder / "photos").mkdir()
    Image.new("L", (30, 30)).save("photos/a.png")
    folder = ["--dataset_name", "image/folder", "--data_dir", "photos"]
    assert run_script(TRAIN, *words, *folder) == 2
    err = capsys.readouterr().err
    assert "must be a multiple of bucket_multiple=64" in err and "set data.image_size or data.bucket_multiple" in err


KEYS = {
    "diffusers-sd15": "unet.mid_block.attentions.0.to_q.lora.down.weight",
    "processors": "mid_block.attn1.processor.to_q_lora.down.weight",
    "cloneofsimo": "unet:0:up",
    "LyCORIS": "lora_unet_mid_block_to_q.hada_w1_a",
    "kohya": "lora_unet_mid_block_to_q.lora_down.weight",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_lora_of_any_format_in_the_place_of_a_model(key, suffix, tmp_path):
    path = tmp_path / f"lora{suffix}"
    save_file({key: torch.ones(2, 2)}, path) if suffix == ".safetensors" else torch.save({key: torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="is a LoRA, not a model"):
        load_model_file(path)


def test_a_folder_of_peft_in_the_place_of_a_model(tmp_path):
    write_lora(LoRAFile({"a": LoRAFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)}), tmp_path / "lora", "peft")
    with pytest.raises(CheckpointError, match="is a LoRA, not a model"):
        load_model_file(tmp_path / "lora")
