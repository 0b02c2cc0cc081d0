"""The sampling command with a tiny Stable Diffusion: a file per image, start images, words, and pictures that repeat."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SAMPLE, files_in, run_script
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from safetensors.torch import save_file
from sd_files import write_native
from tqdm import tqdm
from txt2img_cases import ATTENTION, SIZE, factors, pixels, save_picture

from xdiffusion.build import SAMPLERS, override
from xdiffusion.checkpoints.lora_file import LoRAFile
from xdiffusion.checkpoints.lora_formats import write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.checkpoints.streaming import StoredTensors
from xdiffusion.commands import sd


def test_one_file_per_image_and_seed(sample, work_folder):
    assert sample("a", "--prompt", "a (red:1.3) fox", "--num_samples", 3, "--seed", 7) == 0
    assert files_in(work_folder / "a") == {"samples.png", "image-7.png", "image-8.png", "image-9.png"}
    assert pixels("a/image-7.png").shape == (SIZE, SIZE, 3)
    assert sample("b", "--prompt", "a (red:1.3) fox", "--seed", 8, "--height", 24, "--width", 32) == 0
    assert pixels("b/image-8.png").shape == (24, 32, 3)
    with Image.open("a/image-8.png") as picture:
        assert (picture.text["prompt"], picture.text["seed"]) == ("a (red:1.3) fox", "8")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_bar_ends_when_the_last_picture_is_drawn(sampler, sample, work_folder, monkeypatch):
    class Bar(tqdm):
        def __init__(self, **keywords):
            assert keywords.pop("disable") is None  # none where no terminal is
            super().__init__(**keywords, disable=False)

        def __exit__(self, *raised):
            ends.append((self.n, self.total))
            return super().__exit__(*raised)

    ends = []
    monkeypatch.setattr("tqdm.tqdm", Bar)
    save_picture("start.png")
    words = ["--prompt", "a fox", "--num_samples", 3, "--batch_size", 2, "--sampler", sampler, "--sampling_steps", 4]
    assert sample("a", *words) == 0
    assert sample("b", *words, "--init_image", "start.png", "--strength", 0.5) == 0
    assert ends == [(8, 8), (4, 4)]


def test_a_film_shows_decoded_latents(sample, work_folder):
    assert sample("a", "--prompt", "a fox", "--num_samples", 2, "--save_trajectory", "--offload") == 0
    with Image.open("a/trajectory.gif") as film:
        assert film.n_frames == 3
        assert film.size == (2 * (80 + 6) + 6, 80 + 15 + 12)  # two pictures of 16 pixels, five times enlarged


def test_a_picture_draws_itself_again(sample, work_folder):
    save_picture("start.png")
    words = ["--prompt", "a fox", "--prompt", "[two] houses", "--num_samples", 3, "--seed", 5, "--batch_size", 2]
    more = ["--negative_prompt", "grey", "--init_image", "start.png", "--strength", 0.7, "--sampler", "euler_ancestral"]
    assert sample("a", *words, *more, "--guidance", 3, "--sampling_steps", 3, "--clip_skip", 2) == 0
    assert run_script(SAMPLE, "--from_png", "a/samples.png", "--output_path", "b") == 0
    assert files_in(work_folder / "b") == files_in(work_folder / "a")
    for name in files_in(work_folder / "a"):
        assert np.array_equal(pixels(f"a/{name}"), pixels(f"b/{name}"))
    assert run_script(SAMPLE, "--from_png", "b/samples.png", "--output_path", "c", "--seed", 6) == 0
    assert not np.array_equal(pixels("a/image-6.png"), pixels("c/image-6.png"))  # another prompt's turn
    with Image.open("c/image-6.png") as picture:
        assert "--output_path" not in json.loads(picture.text["command"])


def test_a_picture_of_a_batch_draws_itself_alone(sample, work_folder):
    assert sample("a", "--prompt", "a fox", "--prompt", "a house", "--num_samples", 3, "--seed", 5) == 0
    assert run_script(SAMPLE, "--from_png", "a/image-6.png", "--output_path", "b") == 0
    assert files_in(work_folder / "b") == {"samples.png", "image-6.png"}
    assert np.abs(pixels("a/image-6.png") - pixels("b/image-6.png")).max() <= 1  # batches differ in rounding


@pytest.mark.parametrize(
    ("recipe", "given", "as_if"),
    [
        (["--prompt", "a fox"], ["--prompt", "a house"], ["--prompt", "a house"]),
        (["--prompt", "x", "--guidance", 3], ["--set", "sampling.cfg_scale=1"], ["--prompt", "x", "--guidance", 1]),
        (["--prompt", "x", "--set", "sampling.steps=3"], ["--sampling_steps", 1], ["--prompt", "x", "--sampling_steps", 1]),
        (["--prompt", "x", "--lora_path", "a.safetensors"], ["--lora_path", "a.safetensors:-2"],
         ["--prompt", "x", "--lora_path", "a.safetensors:-2"]),
    ],
)  # fmt: skip
def test_flags_beat_those_of_the_picture(sample, recipe, given, as_if, work_folder, generator):
    write_lora(LoRAFile({ATTENTION: factors(generator)}), Path("a.safetensors"), "native")
    assert sample("a", *recipe) == 0 and sample("b", *as_if) == 0
    assert run_script(SAMPLE, "--from_png", "a/samples.png", "--output_path", "c", *given) == 0
    assert np.array_equal(pixels("b/samples.png"), pixels("c/samples.png"))
    assert not np.array_equal(pixels("a/samples.png"), pixels("c/samples.png"))


def test_start_image_and_mask(sample, work_folder):
    save_picture("start.png", (2 * SIZE, 2 * SIZE))
    mask = Image.new("L", (2 * SIZE, 2 * SIZE))
    mask.paste(255, (0, 0, SIZE, 2 * SIZE))
    mask.save("mask.png")
    words = ["--prompt", "a fox", "--init_image", "start.png"]
    assert sample("none", *words, "--strength", 0) == 0
    assert sample("some", *words, "--strength", 0.5) == 0
    assert sample("masked", *words, "--strength", 1, "--mask_image", "mask.png") == 0
    none, some, masked = (pixels(f"{folder}/image-0.png") for folder in ("none", "some", "masked"))
    assert not np.array_equal(none, some)
    assert np.abs(none - masked)[:, : SIZE // 2].mean() > np.abs(none - masked)[:, -3:].mean()
    with Image.open("start.png") as picture:
        start = np.asarray(ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.LANCZOS)).astype(int)
    reach = SIZE // 2 + 4  # two latents of two pixels
    assert np.abs(masked - start)[:, reach:].max() <= 1 < np.abs(none - start)[:, reach:].max()


def test_a_mask_may_be_white_paint_on_nothing(sample, work_folder):
    save_picture("start.png")
    grey = Image.new("L", (SIZE, SIZE))
    grey.paste(255, (0, 0, SIZE // 2, SIZE))
    grey.save("grey.png")
    paint = Image.new("RGBA", grey.size, (255, 255, 255, 0))
    paint.paste((255,) * 4, (0, 0, SIZE // 2, SIZE))
    paint.save("paint.png")
    for name in ("grey", "paint"):
        assert sample(name, "--prompt", "a fox", "--init_image", "start.png", "--mask_image", f"{name}.png") == 0
    assert np.array_equal(pixels("grey/image-0.png"), pixels("paint/image-0.png"))


@pytest.mark.parametrize("words", ["--mixed_precision bf16", "--offload", "--clip_skip 2", "--times karras", "--tile_size 12"])
def test_flags_that_change_how_it_is_computed(sample, words, work_folder):
    assert sample("plain", "--prompt", "a fox", "--set", "sampling.steps=3") == 0
    assert sample("other", "--prompt", "a fox", "--set", "sampling.steps=3", *words.split()) == 0
    difference = np.abs(pixels("plain/image-0.png") - pixels("other/image-0.png"))
    assert (difference == 0).all() if words == "--offload" else 0 < difference.mean() < 60


# --- learned words and LoRAs ---


def test_learned_words(sample, work_folder, generator, capsys):
    save_file({"<cat>": 3 * torch.randn(2, 8, generator=generator)}, "learned_embeds.safetensors")
    assert sample("plain", "--prompt", "a <cat>") == 0
    assert sample("cat", "--prompt", "a <cat>", "--learned_tokens", "learned_embeds.safetensors") == 0
    assert "learned_embeds.safetensors: <cat> (2 vectors)" in capsys.readouterr().out
    assert sample("fox", "--prompt", "a <fox>", "--learned_tokens", "learned_embeds.safetensors=<fox>") == 0
    assert not np.array_equal(pixels("plain/image-0.png"), pixels("cat/image-0.png"))
    assert np.array_equal(pixels("cat/image-0.png"), pixels("fox/image-0.png"))


def test_words_in_a_lora_file_are_used(sample, work_folder, generator, capsys):
    lora = LoRAFile({ATTENTION: factors(generator)}, tokens={"<s1>": 3 * torch.randn(8, generator=generator)})
    write_lora(lora, Path("style.safetensors"), "native")
    words = ["--prompt", "a <s1>", "--lora_path"]
    assert sample("off", *words, "style.safetensors:0") == 0
    said = capsys.readouterr()
    assert "left out" not in said.out and "no prompt holds" not in said.err
    assert sample("on", *words, "style.safetensors:0.8") == 0
    assert sample("plain", "--prompt", "a <s1>") == 0
    assert "no prompt holds" not in capsys.readouterr().err
    assert sample("other", "--prompt", "a fox", "--lora_path", "style.safetensors") == 0
    assert "style.safetensors: no prompt holds <s1>" in capsys.readouterr().err
    assert not np.array_equal(pixels("off/image-0.png"), pixels("plain/image-0.png"))
    assert not np.array_equal(pixels("off/image-0.png"), pixels("on/image-0.png"))
    assert files_in(work_folder / "on") == {"samples.png", "image-0.png"}
    assert sample("pairs", *words, "style.safetensors:0.8", "--paired") == 0
    assert files_in(work_folder / "pairs") == {"base.png", "lora.png", "paired.png", "image-0.png"}
    assert np.array_equal(pixels("on/image-0.png"), pixels("pairs/image-0.png"))


def test_a_lora_is_drawn_by_what_it_was_trained_to_predict(sample, tiny_txt2img, work_folder, generator, capsys):
    update = {ATTENTION: factors(generator)}
    ztsnr = {"kind": "betas", "zero_terminal_snr": True}
    write_lora(LoRAFile(update), Path("silent.safetensors"), "native")
    for name, schedule in (("v", {"kind": "betas"}), ("ztsnr", ztsnr)):
        config = {"diffusion": {"prediction": "v", "schedule": schedule}}
        write_lora(LoRAFile(update, config=config), Path(f"{name}.safetensors"), "native")
    file = load_model_file(tiny_txt2img)
    config = OmegaConf.to_container(override(OmegaConf.create(file.config), ["diffusion.prediction=v"], "test"))
    save_model(Path("base_v.safetensors"), file.tensors, config=config, image_shape=file.image_shape, step=0)

    words = ["--prompt", "a fox", "--lora_path"]
    assert sample("expected", *words, "silent.safetensors", "--checkpoint", "base_v.safetensors") == 0
    assert "was trained with" not in capsys.readouterr().err
    assert sample("drawn", *words, "v.safetensors", "--paired") == 0
    said = "v.safetensors was trained with diffusion.prediction=v, and is drawn so but for flags; its base has eps"
    assert said in capsys.readouterr().err
    assert sample("silent", *words, "silent.safetensors", "--paired") == 0
    assert np.array_equal(pixels("drawn/image-0.png"), pixels("expected/image-0.png"))
    assert not np.array_equal(pixels("drawn/image-0.png"), pixels("silent/image-0.png"))
    assert np.array_equal(pixels("drawn/base.png"), pixels("silent/base.png"))  # the base is drawn as it was trained
    assert sample("out", *words, "v.safetensors", "--lora_path", "ztsnr.safetensors") == 2
    message = "cannot be drawn together: ztsnr.safetensors was trained with diffusion.schedule.zero_terminal_snr=True"
    assert message in capsys.readouterr().err


def test_the_moving_average_is_a_flag(sample, work_folder, capsys):
    convert = ["convert", str(write_native("sd15_tiny", work_folder / "native.safetensors")), "one.safetensors"]
    sd.main([*convert, "--to", "original"])
    stored = dict(StoredTensors(work_folder / "one.safetensors"))
    average = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": t * 1.1 for n, t in stored.items() if ".diff" in n}
    save_file(stored | average, "both.safetensors")
    words = ["--prompt", "a fox", "--height", 16, "--width", 16, "--sampling_steps", 1, "--checkpoint"]
    for folder, flags in (("none", ["both"]), ("plain", ["both", "--no-ema"]), ("average", ["both", "--ema"])):
        assert sample(folder, *words, f"{flags[0]}.safetensors", *flags[1:]) == 0
    assert np.array_equal(pixels("none/image-0.png"), pixels("plain/image-0.png"))
    assert not np.array_equal(pixels("none/image-0.png"), pixels("average/image-0.png"))
    assert sample("out", *words, "one.safetensors", "--ema") == 2
    assert "one.safetensors: the file holds the moving average of 0 of" in capsys.readouterr().err


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", 'no classes to draw: say what to draw with --prompt "TEXT"'),
        ("--prompt x{class}", "unknown slot {class}; this model has no classes"),
        ("--prompt (fox", "prompt '(fox': '(' is never closed"),
        ("--prompt x --negative_prompt fox]", "']' closes nothing"),
        ("--prompt <lora:ink:0.8>", "'<lora:ink:0.8>' names a file"),
        ("--prompt x --height 20 --width 17", "height=20, width=17: the sides of an image must be multiples of 2"),
        ("--prompt x --clip_skip 3", "clip_skip=3 must be in 1..2"),
        ("--prompt x --init_image none.png", "none.png: cannot be read (No such file or directory)"),
        ("--prompt x --init_image text.txt", "text.txt: cannot be read ("),
        ("--prompt x --init_image start.png --strength 1.5", "strength=1.5 must be in [0, 1]"),
        ("--prompt x --init_image start.png --strength nan", "strength=nan must be in [0, 1]"),
        ("--prompt x --init_image start.png --strength 0.1",
         "strength=0.1 of 2 steps is less than one: take more steps, or at least 0.500"),
        ("--prompt x --seed -1", "argument --seed: '-1' must be a whole number from 0 to 2^63 - 1"),
        ("--prompt x --seed 99999999999999999999", "must be a whole number from 0 to 2^63 - 1"),
        ("--prompt x --num_samples 999999999999", "--num_samples 999999999999 is a grid of 256,000,000 megapixels, above 300"),
        ("--prompt x --init_image dot.png", "dot.png: 30x3 would be enlarged more than 4 times to cover 16x16"),
        ("--prompt x --init_image start.png --mask_image wide.png",
         "the mask wide.png must be of the size of start.png, not 32x16, 16x16"),
        ("--prompt x --init_image start.png --mask_image thin.png",
         "thin.png: the mask selects nothing of the latents (8x8), so nothing would be drawn anew: it must be bright over at "
         "least 2x2 of the image's 16x16 pixels"),
        ("--prompt x --paired", "--paired compares the base with what --lora_path names"),
        ("--prompt x --paired 0.5 half", "argument --paired: 'half' must be a finite number"),
        ("--prompt x --strength 0.5", "--strength is that of --init_image, and there is none"),
        ("--prompt x --mask_image wide.png", "--mask_image says what to draw anew of --init_image"),
        ("--prompt x --learned_tokens none.pt", "no file of learned words at none.pt"),
        ("--prompt x --learned_tokens wide.safetensors", "wide.safetensors: the learned token '<a>' has 16 numbers"),
        ("--prompt x --mixed_precision fp8", "invalid choice: 'fp8'"),
        ("--prompt x --times even", "sampling.times.kind='even' is unknown"),
        ("--from_png", "--from_png: expected one argument"),
        ("--from_png none.png", "none.png cannot be read as a PNG"),
        ("--from_png start.png", "start.png does not say how it was drawn"),
    ],
)  # fmt: skip
def test_one_line_and_nothing_written(sample, words, message, work_folder, capsys):
    save_picture("start.png")
    save_picture("wide.png", (2 * SIZE, SIZE))
    save_picture("dot.png", (30, 3))
    thin = Image.new("L", (SIZE, SIZE))
    thin.paste(255, (5, 0, 6, SIZE))
    thin.save("thin.png")
    Path("text.txt").write_text("no picture")
    save_file({"<a>": torch.ones(16)}, "wide.safetensors")
    before = files_in(work_folder)
    assert sample("out", *words.split()) == 2
    (line,) = capsys.readouterr().err.rstrip("\n").split("\n")
    assert message in line
    assert files_in(work_folder) == before
