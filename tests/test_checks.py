"""What a run says at its start, in a dry run too: nothing is drawn, cached or loaded before."""

import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from commands import TRAIN, run_script, set_words
from omegaconf import OmegaConf
from picture_folders import write_pictures
from tiny import tiny_config, tiny_images
from tiny_sd import CONFIGS, SMALLER, tiny_sd_model

from xdiffusion.build import load_config
from xdiffusion.checkpoints.native import save_model
from xdiffusion.data.captions import PromptTable
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training.checks import check_captions, check_together
from xdiffusion.training.contrastive import ContrastiveModel, ContrastiveTask
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings

INVERSION, DREAMBOOTH = "sd15_textual_inversion_tiny", "sd15_dreambooth_lora_tiny"


def train(name, *words):
    start = ["--load_model_weights_from_checkpoint", "base.safetensors", "--use_lora_training", "--force_cpu"]
    return run_script(TRAIN, "--config_path", CONFIGS / f"{name}.yaml", *set_words(SMALLER), *start, *words)


def save_base(name):
    config = load_config(CONFIGS / f"{name}.yaml", SMALLER)
    model, plain = tiny_sd_model(config), OmegaConf.to_container(config)
    save_model(Path("base.safetensors"), model.state_dict(), config=plain, image_shape=model.image_shape, step=0)


def test_a_dry_run_looks_at_the_base(work_folder, capsys):
    assert train("sd15_lora_tiny", "--dry_run") == 2
    assert "no checkpoint at base.safetensors" in capsys.readouterr().err
    save_base("sd21_base_tiny")
    assert train("sd15_lora_tiny", "--dry_run") == 2
    assert "base.safetensors is a checkpoint for another architecture" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [["--dry_run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (DREAMBOOTH, "--batch_size 3", "--batch_size 3: training.batch_size=3 must be even: class images are half"),
        (DREAMBOOTH, "--set prior.weight=0", "prior.weight=0 must be above 0"),
        (DREAMBOOTH, "--set lora.rank=0", "rank=0"),
        (
            "sd15_lora_tiny",
            "--set optimizer.kind=adamw8bit",
            "optimizer.kind='adamw8bit' needs the library bitsandbytes",
        ),
        (
            INVERSION,
            "--set data.captions=[photo]",
            "no caption of data.captions names textual_inversion.token='<cat>'",
        ),
        (
            "sd15_lora_tiny",
            "--set data.random_crop=true",
            "cache.latents=true keeps one latent of each picture, so data.",
        ),
        ("sd15_lora_tiny", "--set text_encoder_lora.rank=1", "cache.text_embeddings=true is for a frozen text encoder"),
    ],
)
def test_said_before_anything_is_loaded_or_made(name, words, message, dry, work_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    write_pictures(work_folder / "set", [(16, 16)] * 2, ["a picture"])
    assert train(name, "--data_dir", "set", *words.split(), *dry) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in work_folder.iterdir()} == {"set"}


def test_captions_of_the_config_are_checked_without_pictures_too(work_folder, capsys):
    assert train(INVERSION, "--set", "data.captions=[photo]", "--dry_run") == 2
    assert "no caption of data.captions names textual_inversion.token='<cat>'" in capsys.readouterr().err


def test_captions_of_classes_are_checked_too():
    config = tiny_config("textual_inversion.token=<cat>", "textual_inversion.initialiser=cat")
    with pytest.raises(ValueError, match=r"no caption of .* names textual_inversion.token='<cat>'"):
        check_captions(tiny_images(), config, 8)


@pytest.mark.parametrize("cache", ["cache.latents", "cache.text_embeddings"])
def test_only_files_are_cached(cache):
    with pytest.raises(ValueError, match=f"{cache}=true is for image/folder and image/hugging_face, not for image/digits"):
        check_together(tiny_config(f"{cache}=true"), lora=False)


def test_class_images_stand_beside_files_alone():
    with pytest.raises(ValueError, match="prior: is for image/folder and image/hugging_face, not for image/digits"):
        check_together(tiny_config("prior.prompt=a dog", "prior.data_dir=dogs"), lora=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--set prior.data_dir=set/class",
            "set/class lies in set: prior.data_dir, whose pictures are of the class, would",
        ),
        ("--set prior.data_dir=set", "set lies in set: prior.data_dir"),
        ("--set prior.data_dir=.", "set lies in .: --data_dir, whose pictures are of the subject, would"),
        ('--set "data.captions=[a dog, a photo of a dog]"', "prior.prompt='a photo of a dog' is in data.captions"),
        ("""--set "data.captions=['', ' ']\"""", "data.captions=['', ' '] are empty"),
    ],
)
def test_class_images_and_subject_are_kept_apart(words, message, work_folder, capsys):
    write_pictures(work_folder / "set", [(16, 16)] * 2, ["a picture"])
    assert train(DREAMBOOTH, "--data_dir", "set", *shlex.split(words)) == 2
    assert message in capsys.readouterr().err


def test_a_run_does_not_write_where_it_reads(work_folder, capsys):
    save_base("sd15_lora_tiny")
    write_pictures(work_folder / "set", [(16, 16)] * 2, ["a picture"])
    assert train("sd15_lora_tiny", "--data_dir", "set", "--output_path", "set/../set/run") == 2
    assert "what the run draws would be learned with the pictures there" in capsys.readouterr().err
    assert not (work_folder / "set/run").exists()


def test_captions_that_do_not_name_the_word_are_counted(work_folder, capsys):
    write_pictures(work_folder / "set", [(16, 16)] * 3, ["a <cat>", "a dog", "a fox"])
    assert train(INVERSION, "--data_dir", "set", "--set", "data.captions=null", "--dry_run") == 2  # of the base
    save_base(INVERSION)
    capsys.readouterr()
    assert train(INVERSION, "--data_dir", "set", "--set", "data.captions=null", "--dry_run") == 0
    assert "captions: 2 of 3 do not name <cat> where it is read, and teach it nothing" in capsys.readouterr().out


def test_min_snr_with_zero_terminal_snr_is_said(capsys):
    schedule = ["diffusion.schedule.kind=betas", "diffusion.schedule.zero_terminal_snr=true"]
    for gamma, said in (("5", True), ("null", False)):
        check_together(tiny_config(*schedule, f"diffusion.min_snr_gamma={gamma}"), lora=False)
        assert ("diffusion.min_snr_gamma=5 gives the noisiest times" in capsys.readouterr().err) == said


def test_a_class_without_images_is_named():
    model = ContrastiveModel(CLIPTextEncoder(width=8, layers=1, heads=2), image_size=12, channels=1)
    images = tiny_images()
    threes = images.train.labels == 3
    images.train.labels[threes] = 4
    with pytest.raises(ValueError, match="has no training image of 3: the tiny CLIP needs one of each class"):
        ContrastiveTask(model, images, TrainingSettings(batch_size=20), OptimizerSettings())


@pytest.mark.parametrize("token", ["<dog>", "<DOG>"])
def test_captions_beside_the_pictures_may_name_the_word(token, work_folder, capsys):
    write_pictures(work_folder / "set", [(16, 16)] * 2, ["a <dog>", "a picture"])
    words = [
        "--set",
        f"textual_inversion.token={token}",
        "--set",
        "data.captions=null",
        "--data_dir",
        "set",
        "--dry_run",
    ]
    save_base(INVERSION)
    assert train(INVERSION, *words) == 0
    Path("set/picture_0.txt").write_text("a cat")
    assert train(INVERSION, *words) == 2
    assert f"names textual_inversion.token={token!r}" in capsys.readouterr().err


@pytest.mark.parametrize("caption", ["photo of mycats", "mycat_1", "one two three four five six seven mycat"])
def test_a_word_that_is_not_read_is_not_named(caption):
    """Inside another word, or behind the six tokens that a context of 8 has room for."""
    config = tiny_config("textual_inversion.token=mycat", "textual_inversion.initialiser=cat")
    images = tiny_images()
    for captions, named in (((caption,), False), ((caption, "MyCat, a photo"), True)):
        shown = replace(images, prompts=PromptTable(names=tuple((c,) for c in captions), templates=("{}",)))
        with nullcontext() if named else pytest.raises(ValueError, match=r"token='mycat' as a word"):
            check_captions(shown, config, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixed_precision", "fp16"], "training.mixed_precision=fp16 needs a GPU"),
        (["--resume_from", "typo.state.pt"], "no checkpoint at typo.state.pt"),
    ],
)
def test_what_cannot_go_on_draws_no_class_images(words, message, work_folder, capsys):
    write_pictures(work_folder / "set", [(16, 16)] * 2, ["a picture"])
    save_base(DREAMBOOTH)
    assert train(DREAMBOOTH, "--data_dir", "set", "--force_cpu", "--set", "prior.data_dir=class", *words) == 2
    assert message in capsys.readouterr().err
    assert not (work_folder / "class").exists()


@pytest.mark.parametrize("more", [["--dry_run"], ["--num_training_steps", "1"]], ids=["dry run", "run"])
def test_captions_that_are_cut_are_counted(more, work_folder, capsys):
    write_pictures(work_folder / "set", [(16, 16)] * 3, ["one two three four five six", "one " * 7, "one two"])
    save_base("sd15_lora_tiny")
    assert train("sd15_lora_tiny", "--data_dir", "set", *more) == 0
    assert "captions: 1 of 3 have more than the 6 tokens that the text encoder reads" in capsys.readouterr().out
