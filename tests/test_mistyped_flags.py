"""A flag that there is not, what may have been meant by it, and the home folder in a flag's path."""

from pathlib import Path

import pytest
from commands import ABLATE, EVALUATE, ROOT, SAMPLE, TRAIN, TRAIN_CLIP, run_script
from lora_cases import command

from xdiffusion import cli
from xdiffusion.build import load_config

DIGITS = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
CONFIG, MODEL = f"--config_path {DIGITS}", "--checkpoint a.safetensors"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (TRAIN, "--config_pth c.yaml", "required: --config_path; --config_pth: did you mean --config_path? "),
        (TRAIN_CLIP, f"{CONFIG} --output_path=", "--output_path is empty; leave it out for the default"),
        (SAMPLE, f"{MODEL} --output_path=", "--output_path is empty; leave it out for the default"),
        (ABLATE, "--checkpoint a --output_path=", "--output_path is empty; leave it out for the default"),
        (EVALUATE, "--checkpoint=", "--checkpoint is empty; it is needed"),
        (
            TRAIN,
            f"{CONFIG} --load_model_weights_from_checkpoint=",
            "--load_model_weights_from_checkpoint is empty; leave",
        ),
        (TRAIN, f"{CONFIG} --use_lora", "--use_lora; --use_lora: did you mean --use_lora_training? "),
        (TRAIN, f"{CONFIG} --num_steps 3", "--num_steps 3; --num_steps: did you mean --num_training_steps? "),
        (TRAIN, f"{CONFIG} --learning_rate=1e-3", "did you mean --set optimizer.learning_rate=... or --set text_en"),
        (TRAIN, f"{CONFIG} --lora-rank 3 --rank 4", "; --rank: did you mean --set lora.rank=... or "),
        (TRAIN_CLIP, f"{CONFIG} --num_timesteps 3", "did you mean --set diffusion.schedule.num_timesteps=...?"),
        (ABLATE, "--checkpoint a --learning_rate 1", "--set optimizer.learning_rate=..."),
        (SAMPLE, f"{MODEL} --lora_pth F", "; --lora_pth: did you mean --lora_path? "),
        (SAMPLE, f"{MODEL} --eta 1", "; --eta: did you mean --set sampling.sampler.eta=...? "),
        (EVALUATE, f"{MODEL} --steps 9", "; --steps: did you mean --set sampling.steps=...? "),
    ],
)
def test_the_flag_that_may_have_been_meant_is_named(script, words, said, work_folder, capsys):
    assert run_script(script, *words.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_second_lora_is_not_dropped(work_folder, capsys):
    assert run_script(EVALUATE, *f"{MODEL} --lora_path a --lora_path b".split()) == 2
    assert "--lora_path is given 2 times, and one LoRA is scored" in capsys.readouterr().err


def test_no_key_is_proposed_that_could_not_be_set(work_folder, capsys):
    assert run_script(SAMPLE, *f"{MODEL} --learning_rate 1".split()) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --learning_rate 1 (--help lists the flags)\n"


def test_flags_of_a_sub_command(work_folder, capsys):
    assert command("lora merge a b c --dtpe float16") == 2
    assert "; --dtpe: did you mean --dtype? " in capsys.readouterr().err
    assert command("lora merge a b c --dtype float8") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_home_folder_stands_for_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = cli.Parser()
    for flag in ("--output_path", "--set", "--prompt", "--negative_prompt"):
        parser.add_argument(flag, action="append")
    words = ["--output_path=~/runs", "--output_path", "~/runs", "--output_path", "a~/b", "--set", "cache.folder=~/c"]
    words += ["--prompt", "~/a fox", "--prompt=~/a fox", "--negative_prompt", "~/no"]
    args = parser.parse_args(words)
    assert args.output_path == ["/home/me/runs", "/home/me/runs", "a~/b"]
    assert (args.prompt, args.negative_prompt) == (["~/a fox", "~/a fox"], ["~/no"])
    config = load_config(DIGITS, [*args.set, "data={kind: image/mnist, image_size: 8, data_dir: ~/mnist}"])
    assert (config.cache.folder, config.data.data_dir) == ("/home/me/c", "/home/me/mnist")


def test_no_folder_called_tilde_is_made(tiny_run, work_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(work_folder / "home"))
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 1, "--output_path=~/out"]
    assert run_script(SAMPLE, *words) == 0
    assert [path.name for path in Path().iterdir()] == ["home"]
    assert (work_folder / "home/out/samples.png").is_file()
