"""The sample grids of a run: what they draw of captions, and of the prompts that a config names (training.sample_prompts)."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TRAIN, files_in, run_script, set_words
from omegaconf import OmegaConf
from picture_folders import write_pictures
from PIL import Image
from tiny_sd import CONFIGS, SMALLER, tiny_sd_config, tiny_sd_model, tiny_sd_trainer

from xdiffusion.build import build_sampling
from xdiffusion.checkpoints.native import save_model
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.data.captions import PromptTable
from xdiffusion.model import generate, generators_for
from xdiffusion.pictures import grid
from xdiffusion.training.loop import averaged
from xdiffusion.training.previews import draw_sample_grid
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run

CAPTIONS = PromptTable(names=(("a (fox",), ("a dog",)), templates=("{}",))
DIGITS = CONFIGS.parent / "digits/ddpm_24x24_v_continuous_clip.yaml"


def said(path: Path) -> list[str]:
    """The prompts that a grid says it drew."""
    with Image.open(path) as picture:
        return picture.text["prompts"].split("\n")


def sd_model(*overrides: str):
    config = tiny_sd_config(Path("nowhere"), "sampling.cfg_scale=3", *overrides)
    model = tiny_sd_model(config).eval()
    return model, build_sampling(config, model.schedule)


def test_own_prompts_are_drawn_twice_as_the_sampling_command_draws_them(tmp_path):
    model, sampling = sd_model()
    prompts = ["a (red:2) fox", "[a] dog", "a fox " * 9]  # the last in several chunks
    page = draw_sample_grid(model, CAPTIONS, sampling, tmp_path / "a.png", "step 1", own=prompts)
    images = generate(model, prompts * 2, generators_for(0, 6), **sampling)
    assert np.array_equal(np.asarray(page), np.asarray(grid(images, prompts * 2, columns=3, title="step 1")))
    assert said(tmp_path / "a.png") == prompts * 2
    again = draw_sample_grid(model, CAPTIONS, sampling, None, "step 1", own=prompts)
    assert np.array_equal(np.asarray(page), np.asarray(again))  # from the same noise


@pytest.mark.parametrize("prompts", [(), []])
def test_without_own_prompts_captions_are_drawn_whose_brackets_are_no_weights(prompts, tmp_path):
    model, sampling = sd_model()
    draw_sample_grid(model, CAPTIONS, sampling, tmp_path / "a.png", "step 1", own=prompts)
    assert said(tmp_path / "a.png") == ["a (fox", "a dog"] * 2


def test_a_learned_word_in_a_prompt_is_drawn_as_it_is_at_that_step(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16)] * 4, ["unused"])
    faster = ["optimizer.learning_rate=1", "optimizer.weight_decay=0"]
    config = tiny_sd_config(tmp_path, *faster, name="sd15_textual_inversion_tiny", lora=False)
    trainer = tiny_sd_trainer(config, lora=False)
    sampling = build_sampling(config, trainer.model.schedule)
    pages = []
    for step in (1, 2):
        trainer.step(step)
        with averaged(trainer):
            pages.append(
                {
                    prompt: np.asarray(draw_sample_grid(trainer.model, CAPTIONS, sampling, None, "", own=[prompt]))
                    for prompt in ("a (<cat>:1.2)", "a dog")
                }
            )
    before, after = pages
    assert not np.array_equal(before["a (<cat>:1.2)"], after["a (<cat>:1.2)"])
    assert np.array_equal(before["a dog"], after["a dog"])


# --- the training command ---


def test_a_run_draws_its_prompts_and_learns_as_without_them(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--output_path", "out"]
    prompts = ["--sample_prompt", "a grey {class}", "--sample_prompt", "3", "--sample_prompt=~/é 🦊: # \\"]
    assert run_script(TRAIN, *words, *prompts, "--no-sample_with_guidance") == 0
    grey = [f"a grey {digit}" for digit in range(10)]
    assert said(Path("out/samples/sample-2.png")) == [*grey, "3", "~/é 🦊: # \\"] * 2
    ours, theirs = (load_safetensors(path)[0] for path in (Path("out/diffusion-2.safetensors"), tiny_run.checkpoint))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_run(Path("out"))["config"]["training"]["sample_prompts"][1] == "3"


def test_a_resumed_run_may_have_other_prompts(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--num_training_steps", "4"]
    words += ["--set", "optimizer.schedule=constant"]
    assert run_script(TRAIN, *words, "--output_path", "whole") == 0
    short = [*words, "--output_path", "cut", "--resume_from", "auto"]
    assert run_script(TRAIN, *short, "--num_training_steps", "2", "--sample_prompt", "{class}") == 0
    capsys.readouterr()
    assert run_script(TRAIN, *short, "--sample_prompt", "a seven") == 0
    assert "training.sample_prompts=['{class}'] before, ['a seven'] now" in capsys.readouterr().err
    assert said(Path("cut/samples/sample-4.png")) == ["a seven"] * 2
    whole, cut = (load_safetensors(Path(name, "diffusion-4.safetensors"))[0] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = [[m["loss"] for m in read_metrics(Path(name, "metrics.jsonl"))] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def sd_words(name: str, *more: str) -> list:
    config = tiny_sd_config(Path(), name=name)
    model, plain = tiny_sd_model(config), OmegaConf.to_container(config)
    save_model(Path("base.safetensors"), model.state_dict(), config=plain, image_shape=model.image_shape, step=0)
    write_pictures(Path("set"), [(16, 16)] * 3, ["a picture"])
    words = ["--config_path", CONFIGS / f"{name}.yaml", *set_words(SMALLER), "--data_dir", "set", "--force_cpu"]
    words += ["--load_model_weights_from_checkpoint", "base.safetensors", "--num_training_steps", "2"]
    return [*words, "--output_path", "out", "--set", "cache.folder=cache", *more]


def test_prompts_of_the_yaml_beside_cached_embeddings(work_folder, capsys):
    words = sd_words("sd15_lora_tiny", "--use_lora_training")
    own = Path("own.yaml")
    own.write_text(f"base: {CONFIGS / 'sd15_lora_tiny.yaml'}\nlora: {{training: {{sample_prompts: [a (red:1.3) fox]}}}}\n")
    words[1] = own
    assert run_script(TRAIN, *words) == 0
    out = capsys.readouterr()
    assert "text embeddings: 2 computed" in out.out  # of the caption and of none: a prompt is no business of the cache
    assert said(Path("out/samples/sample-2.png")) == ["a (red:1.3) fox"] * 2
    assert any(Path("out/tensorboard").iterdir())


def test_class_images_and_captions_stay_plain_beside_own_prompts(work_folder):
    words = sd_words("sd15_dreambooth_lora_tiny", "--use_lora_training", "--sample_prompt", "((sks)) dog on the moon")
    classes = ["--set", "prior.data_dir=class", "--set", "prior.num_images=1", "--set", "prior.prompt=a dog (small"]
    assert run_script(TRAIN, *words, *classes) == 0
    assert said(Path("out/samples/sample-2.png")) == ["((sks)) dog on the moon"] * 2


def test_a_word_that_no_prompt_names_is_told(work_folder, capsys):
    words = partial(sd_words, "sd15_textual_inversion_tiny", "--dry_run", "--sample_prompt")
    assert run_script(TRAIN, *words("a dog")) == 0
    assert "warning: no prompt of training.sample_prompts names <cat>" in capsys.readouterr().err
    assert run_script(TRAIN, *words("a dog"), "--sample_prompt", "a (<CAT>:1.1) BREAK") == 0
    err = capsys.readouterr().err
    assert "no prompt" not in err and "BREAK in a prompt is taken as a word" in err


@pytest.mark.parametrize("dry", [["--dry_run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (DIGITS, ["--sample_prompt", "a {clas}"], "training.sample_prompts 'a {clas}' has the unknown slot {clas}; allowed"),
        (DIGITS, ["--sample_prompt", "a {class"], "'a {class' has a brace without its other one; allowed: {class}"),
        (DIGITS, ["--sample_prompt", "3", "--sample_prompt="], "training.sample_prompts=['3', ''] must be texts that are not"),
        (DIGITS, ["--set", "training.sample_prompts=[' ']"], "training.sample_prompts=[' '] must be texts that are not"),
        (DIGITS, ["--set", "training.sample_prompts=a fox"], "training.sample_prompts='a fox' must be a list of str or null"),
        (DIGITS, ["--set", "training.sample_prompts=[3, 7]"], "training.sample_prompts=[3, 7] must be a list of str or null"),
        (DIGITS, ["--sample_prompt", "one " * 11], "has 11 tokens, and the text encoder reads 10"),
        (DIGITS, ["--sample_prompt", "{class} " * 11], "has 11 tokens, and the text encoder reads 10"),
        (DIGITS, ["--sample_prompt", "\udcff"], "'\\udcff' is no Unicode text"),
        ("sd15_lora_tiny", ["--sample_prompt", "a {class}"], "the unknown slot {class}; this model has no classes"),
        ("sd15_lora_tiny", ["--sample_prompt", "a (fox"], "training.sample_prompts: prompt 'a (fox': '(' is never closed"),
        ("sd15_lora_tiny", ["--sample_prompt", "a <lora:x:1>"], "training.sample_prompts: prompt 'a <lora:x:1>'"),
        ("sd15_lora_tiny", ["--sample_prompt", "x" * 20_000], "has 20,000 letters; allowed are 16,384"),
        (
            "sd15_lora_tiny",
            ["--sample_prompt", "a fox", "--set", "sampling.negative_prompt=(bad"],
            "sampling.negative_prompt: prompt '(bad': '(' is never closed",
        ),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_drawn_is_said_before_any_work(config, words, message, dry, work_folder, capsys):
    start = ["--config_path", config]
    if config != DIGITS:
        write_pictures(work_folder / "set", [(16, 16)] * 2, ["a picture"])
        start = ["--config_path", CONFIGS / f"{config}.yaml", *set_words(SMALLER), "--data_dir", "set"]
        start += ["--use_lora_training", "--load_model_weights_from_checkpoint", "base.safetensors"]
    before = files_in(work_folder)
    assert run_script(TRAIN, *start, *words, "--force_cpu", *dry) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")
    assert ("--sample_prompt: " in err) == (words[0].startswith("--sample_prompt") and "negative_prompt" not in message)
    assert files_in(work_folder) == before
