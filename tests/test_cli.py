"""The commands as a user types them: their help, what they write and what they say."""

import json
import math
import re
import resource
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import (
    ABLATE,
    DEMO,
    EVALUATE,
    ROOT,
    SAMPLE,
    SAMPLE_MNIST,
    TRAIN,
    TRAIN_CLIP,
    files_in,
    run_process,
    run_script,
    set_words,
)
from omegaconf import OmegaConf
from PIL import Image, ImageSequence

from xdiffusion import pictures, scoring
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.data.digits import load_digits
from xdiffusion.data.image_set import invert
from xdiffusion.evaluation.judge import train_judge

HEADER = 20  # pixels of a titled grid above its images


def pixels(path: Path) -> np.ndarray:
    """Of a picture, below its title if it is titled."""
    with Image.open(path) as picture:
        levels = np.asarray(picture).astype(int)
    return levels[HEADER:] if path.name in ("base.png", "lora.png") else levels


def frames(path: Path) -> np.ndarray:
    with Image.open(path) as film:
        return np.stack([np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(film)])


# --- help ---

FLAGS = {
    TRAIN: "config_path dataset_name data_dir output_path num_training_steps batch_size save_and_sample_every_n "
    "load_model_weights_from_checkpoint resume_from mixed_precision use_lora_training sample_with_guidance compile "
    "force_cpu seed set dry_run sample_prompt",
    SAMPLE: "config_path checkpoint lora_path lora_merge num_samples prompt guidance sampling_steps sampler seed output_path "
    "force_cpu save_trajectory times negative_prompt paired learned_tokens batch_size clip_skip height width init_image "
    "strength mask_image mixed_precision offload tile_size from_png",
    EVALUATE: "checkpoint lora_path dataset_name data_dir num_samples batch_size seed intervals full clip report "
    "images_path json",
    TRAIN_CLIP: "config_path dataset_name data_dir output_path num_training_steps seed set",
    DEMO: "output_path num_training_steps num_samples seed",
    ABLATE: "checkpoint config_path dataset_name output_path ranks targets variants num_training_steps num_samples seed set",
}
FLAGS[SAMPLE_MNIST] = FLAGS[SAMPLE]


@pytest.mark.parametrize("script", FLAGS)
def test_help_lists_every_flag_and_loads_nothing_heavy(script):
    done = run_process(script, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    listed = set(re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE))
    assert set(FLAGS[script].split()) <= listed
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "omegaconf", "PIL", "matplotlib"}


# --- what the training command writes ---


def test_a_base_run_and_a_lora_run_write_what_they_promise(tiny_run):
    base, lora = tiny_run.checkpoint.parent, tiny_run.lora.parent
    record = {"config.yaml", "metrics.jsonl", "run.json", "loss.png", "samples/sample-2.png"}
    for run_folder, weights in ((base, "diffusion-2"), (lora, "diffusion-2-lora")):
        written = {name for name in files_in(run_folder) if not name.startswith("tensorboard/")}
        assert written == record | {f"{weights}.safetensors", f"{weights}.state.pt"}
        assert [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert tiny_run.lora.stat().st_size < tiny_run.checkpoint.stat().st_size / 10
    assert (lora / "diffusion-2-lora.state.pt").stat().st_size < (base / "diffusion-2.state.pt").stat().st_size / 3
    config = OmegaConf.load(base / "config.yaml")
    assert OmegaConf.to_container(config) == load_model_file(tiny_run.checkpoint).config


def test_keys_of_loras_that_a_base_run_does_not_read_are_named(tiny_run, work_folder, capsys):
    overrides = [*tiny_run.overrides, "lora.rank=2", "optimizer.lora_plus_ratio=4"]
    words = ["--config_path", tiny_run.config_path, *set_words(overrides)]
    assert run_script(TRAIN, *words) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "nothing reads" in line]
    assert note.startswith("note: without --use_lora_training nothing reads lora.")
    assert note.endswith("lora.rank=2, optimizer.lora_plus_ratio=4")
    base = ["--load_model_weights_from_checkpoint", tiny_run.checkpoint]
    assert run_script(TRAIN, *words, "--use_lora_training", *base) == 0
    assert "nothing reads" not in capsys.readouterr().out


def test_a_dry_run_tells_and_writes_nothing(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--dry_run"]
    assert run_script(TRAIN, *words, "--use_lora_training", "--batch_size", 7) == 0
    out = capsys.readouterr().out
    assert OmegaConf.create(out.partition("parameters:")[0]).training.batch_size == 7
    assert re.search(r"LoRA: [\d,]+ trainable parameters in \d+ layers, [\d.]+% of the network's", out)
    assert files_in(work_folder) == set()


@pytest.mark.parametrize(
    ("name", "words", "lines"),
    [
        ("sd15", [], ["hint: this run trains all 860 M of them: weights, gradients and AdamW's moments take 14 GB"]),
        ("sd15_lora_textencoder", ["--use_lora_training"], ["LoRA: 797,184 trainable", "LoRA: 294,912 trainable"]),
        ("sd15_textual_inversion", ["--mixed_precision", "fp16"], ["learned word <cat>: 1 trainable"]),
        ("sd15_lora", ["--use_lora_training", "--set", "lora.init=pissa", "--set", "lora.use_dora=true"], ["LoRA: "]),
    ],
)
def test_a_dry_run_of_a_large_model_makes_no_weights(name, words, lines, work_folder, capsys):
    config_path = ROOT / f"configs/image/sd/{name}.yaml"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_script(TRAIN, "--config_path", config_path, *words, "--dry_run") == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
    assert grown < 400_000  # of 4 GB in float32
    out = capsys.readouterr().out
    assert re.search(r"network 859,520,964( \(frozen\))?, text encoder 123,650,304 \(frozen\), autoencoder 83,653,863 ", out)
    assert all(line in out for line in lines)
    assert ("network 859,520,964 (frozen)" in out) != ("hint: " in out)


def test_the_clip_command_writes_a_text_encoder_that_training_takes(tiny_run, work_folder, capsys):
    words = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides)]
    assert run_script(TRAIN_CLIP, *words, "--num_training_steps", 2, "--output_path", "clip.safetensors") == 0
    assert "zero-shot accuracy" in capsys.readouterr().out
    clip = ["--set", "model.text_encoder.pretrained=clip.safetensors", "--output_path", "run"]
    assert run_script(TRAIN, *words, *clip, "--num_training_steps", 1) == 0
    tensors = load_model_file(work_folder / "run/diffusion-1.safetensors").tensors
    trained = torch.load(work_folder / "run/diffusion-1.state.pt", weights_only=True)["trained"]
    assert any(name.startswith("text_encoder.") for name in tensors)
    assert not any(name.startswith("text_encoder.") for name in trained)  # frozen


# --- sampling ---


def test_sampling_without_a_lora(tiny_run, work_folder, capsys):
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 3, "--seed", 4]
    assert run_script(SAMPLE, *words) == 0
    picture = Path("output/image/digits/sample") / tiny_run.checkpoint.parent.name / "samples.png"
    assert files_in(work_folder) == {str(picture)}
    assert str(picture) in capsys.readouterr().out
    with Image.open(picture) as read:
        assert json.loads(read.text["prompts"]) == ["0", "1", "2"]
        assert read.text["seed"] == "4"
        assert read.text["checkpoint"] == str(tiny_run.checkpoint)
        assert json.loads(read.text["sampling"])["steps"] == 2
    assert run_script(SAMPLE, *words, "--output_path", "again") == 0
    assert run_script(SAMPLE, *words[:-1], 5, "--output_path", "other") == 0
    assert np.array_equal(pixels(picture), pixels(work_folder / "again/samples.png"))
    assert not np.array_equal(pixels(picture), pixels(work_folder / "other/samples.png"))


def test_drawing_loads_neither_the_compiler_nor_what_it_computes_sizes_with(tiny_run, work_folder):
    """More than a second of every start: a decorator, or one call on the meta device, is enough."""
    words = ["--checkpoint", tiny_run.checkpoint, "--lora_path", tiny_run.lora, "--num_samples", 1]
    done = run_process(SAMPLE, *words, python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    after_torch = set(loaded[loaded.index("torch") :])  # what it loads itself stands before it
    assert "xdiffusion.lora.functional" in after_torch
    assert not after_torch & {"torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes"}


def test_sampling_with_a_lora_pairs_it_with_the_base(tiny_run, work_folder, capsys):
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 4, "--output_path"]
    assert run_script(SAMPLE, *words, "plain") == 0
    assert run_script(SAMPLE, *words, "off", "--lora_path", f"{tiny_run.lora}:0") == 0
    assert run_script(SAMPLE, *words, "on", "--lora_path", f"{tiny_run.lora}:40", "--save_trajectory") == 0
    assert "modules matched" in capsys.readouterr().out
    assert files_in(work_folder / "off") == {"base.png", "lora.png", "paired.png"}
    plain, off = pixels(work_folder / "plain/samples.png"), pixels(work_folder / "off/lora.png")
    assert np.array_equal(plain, pixels(work_folder / "on/base.png"))
    assert np.array_equal(plain, off)
    assert np.abs(plain - pixels(work_folder / "on/lora.png")).max() > 20
    assert 3 * 72 < pixels(work_folder / "on/paired.png").shape[0] < 4 * 72  # base, x 0.5, x 1


def test_each_grid_is_called_by_its_own_strength(tiny_run, work_folder, monkeypatch):
    titles, rows = [], []
    grid, labelled_rows = pictures.grid, pictures.labelled_rows

    def named_grid(*given, title="", **more):
        titles.append(title)
        return grid(*given, title=title, **more)

    def named_rows(images, labels, captions):
        rows.extend(labels)
        return labelled_rows(images, labels, captions)

    monkeypatch.setattr(pictures, "grid", named_grid)
    monkeypatch.setattr(pictures, "labelled_rows", named_rows)
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 2, "--lora_path", f"{tiny_run.lora}:2"]
    assert run_script(SAMPLE, *words, "--output_path", "on") == 0
    assert [title for title in titles if title] == ["base", "LoRA x 2"]  # the rows are grids too
    assert rows == ["base", "LoRA x 1", "LoRA x 2"]
    # shares of the strength that are asked for, in the order of their size; a picture remembers them
    rows.clear()
    assert run_script(SAMPLE, *words, "--output_path", "more", "--paired", 1.2, -0.25, 0) == 0
    asked = list(rows)
    assert asked == ["base", "LoRA x -0.5", "LoRA x 2", "LoRA x 2.4"]
    assert run_script(SAMPLE, "--from_png", "more/lora.png", "--output_path", "again") == 0
    assert rows == 2 * asked
    more, again = (pixels(work_folder / name / "paired.png") for name in ("more", "again"))
    assert np.array_equal(more, again)
    assert run_script(SAMPLE, *words, "--output_path", "alone", "--no-paired") == 0
    assert files_in(work_folder / "alone") == {"samples.png"}


def test_a_film_goes_from_noise_to_the_images_whatever_the_batch(tiny_run, work_folder):
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 4, "--save_trajectory", "--output_path"]
    assert run_script(SAMPLE, *words, "whole") == 0
    assert run_script(SAMPLE, *words, "parts", "--batch_size", 3) == 0
    films = [frames(work_folder / name / "trajectory.gif") for name in ("whole", "parts")]
    assert [len(film) for film in films] == [3, 3]  # the noise, and each of two sampling steps
    assert np.abs(films[0] - films[1]).max() <= 8  # colours of a palette
    assert np.abs(films[0][-1] - pixels(work_folder / "whole/samples.png")).max() <= 8
    tile = films[0][0][6:78, 6:78, 0]
    assert tile.std() > 60  # unit noise, clamped to what pixels can be


def test_strengths_of_several_loras_add_up(tiny_run, work_folder):
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 2, "--output_path"]
    assert run_script(SAMPLE, *words, "one", "--lora_path", f"{tiny_run.lora}:30") == 0
    assert run_script(SAMPLE, *words, "two", "--lora_path", f"{tiny_run.lora}:10", "--lora_path", f"{tiny_run.lora}:20") == 0
    assert np.abs(pixels(work_folder / "one/lora.png") - pixels(work_folder / "two/lora.png")).max() <= 2
    assert np.abs(pixels(work_folder / "one/lora.png") - pixels(work_folder / "one/base.png")).max() > 20


def test_prompts_sampler_and_guidance_from_the_command_line(tiny_run, work_folder):
    words = [
        "--checkpoint",
        tiny_run.checkpoint,
        "--output_path",
        "out",
        "--prompt",
        "a handwritten {class}",
        "--prompt",
        "7",
    ]
    assert run_script(SAMPLE, *words, "--sampler", "heun", "--sampling_steps", 3, "--guidance", 1.5) == 0
    with Image.open("out/samples.png") as read:
        assert json.loads(read.text["prompts"]) == [*(f"a handwritten {digit}" for digit in range(10)), "7"]
        sampling = json.loads(read.text["sampling"])
    assert (sampling["sampler"]["kind"], sampling["steps"], sampling["cfg_scale"]) == ("heun", 3, 1.5)


def test_the_mnist_command_is_the_same_one(tiny_run, work_folder, monkeypatch):
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 1, "--output_path"]
    assert run_script(SAMPLE, *words, "one") == 0
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words), "two"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / SAMPLE_MNIST), run_name="__main__")
    assert stop.value.code == 0
    assert np.array_equal(pixels(work_folder / "one/samples.png"), pixels(work_folder / "two/samples.png"))


def test_pt_names_of_older_commands_are_taken_with_a_line_saying_so(tiny_run, work_folder, capsys):
    checkpoint, lora = tiny_run.checkpoint.with_suffix(".pt"), tiny_run.lora.with_suffix(".pt")
    train = ["--config_path", tiny_run.config_path, *set_words(tiny_run.overrides), "--num_training_steps", 1]
    base_note = f"{checkpoint} is not there; reading {tiny_run.checkpoint.name} beside it"
    lora_note = f"{lora} is not there; reading {tiny_run.lora.name} beside it"
    assert run_script(SAMPLE, "--checkpoint", checkpoint, "--lora_path", f"{lora}:2", "--num_samples", 1) == 0
    assert capsys.readouterr().err.splitlines() == [base_note, lora_note]
    assert run_script(TRAIN, *train, "--load_model_weights_from_checkpoint", checkpoint) == 0
    assert base_note in capsys.readouterr().err.splitlines()


# --- scores ---


def test_evaluation_prints_one_json_line(tiny_run, work_folder, capsys, monkeypatch):
    trained = []

    def quick_judge(*arguments):
        trained.append(arguments)
        return train_judge(*arguments, steps=5)

    monkeypatch.setattr(scoring, "train_judge", quick_judge)
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 12, "--seed", 1, "--json"]
    scores = []
    style = ["--lora_path", tiny_run.lora, "--dataset_name", "image/digits_inverted", "--images_path", "images"]
    for more in ([], style):
        assert run_script(EVALUATE, *words, *more) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        assert err == ""
        scores.append(json.loads(out))
    assert len(trained) == 1  # once for a data set and its inverted style
    assert {name.split("/")[0] for name in files_in(work_folder)} == {"output", "images"}
    size = pixels(work_folder / "images/samples/00000.png").shape[0]
    held_out = invert(load_digits(size)).test.images
    assert [len(files_in(work_folder / "images" / name)) for name in ("samples", "held_out")] == [12, len(held_out)]
    assert np.array_equal(pixels(work_folder / "images/held_out/00003.png")[..., 0], held_out[3, 0])
    base, lora = scores
    for score in scores:
        assert 0 <= score["prompt_accuracy"] <= 1
        assert 0 <= score["background"] <= 1
        assert 0 < score["judge_accuracy"] <= 1
        assert score["frechet_distance"] > score["frechet_floor"] > 0
        assert score["seconds_per_image"] > 0
        assert (score["num_samples"], score["seed"]) == (12, 1)
    assert (base["dataset"], lora["dataset"]) == ("image/digits", "image/digits_inverted")
    assert base["gap_closed"] is None
    assert math.isfinite(lora["gap_closed"])


@pytest.mark.parametrize("words", [[SAMPLE], [EVALUATE, "--full", "--json"], [EVALUATE, "--report", "out.html"]])
def test_a_model_of_nan_is_one_line_and_no_picture(words, tiny_run, work_folder, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", lambda *arguments: train_judge(*arguments, steps=1))
    file = load_model_file(tiny_run.checkpoint)
    file.tensors["network.conv_out.bias"] = torch.full_like(file.tensors["network.conv_out.bias"], torch.nan)
    save_model(Path("nan.safetensors"), file.tensors, config=file.config, image_shape=file.image_shape, step=2)
    assert run_script(*words, "--checkpoint", "nan.safetensors", "--num_samples", 20) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: 20 of the first 20 images that this model draws are not finite: NaN or infinity in its weights, or "
        "numbers too large for its precision\n"
    )
    assert not list(work_folder.rglob("*.png")) and not (work_folder / "out.html").exists()
