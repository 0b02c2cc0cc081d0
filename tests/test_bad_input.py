"""What the commands say to bad input: one line that names it and what is allowed, status 2, and nothing written."""

import json
import math
import pickle
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import DEMO, EVALUATE, SAMPLE, TRAIN, TRAIN_CLIP, files_in, run_process, run_script, set_words

from xdiffusion.checkpoints.lora_formats import read_lora, write_lora
from xdiffusion.checkpoints.native import load_model_file, save_model
from xdiffusion.loading import load_model
from xdiffusion.training import diffusion_task

BASE = "--load_model_weights_from_checkpoint"
LORA = f"--use_lora_training {BASE}"
# script -> words that spoil a good command -> pieces of the message, in this order; {name} is a file, see below
BAD_INPUT = {
    TRAIN: {
        "--set optimizer.learning_rat=1": "optimizer.learning_rat is unknown, did you mean learning_rate?; allowed: ",
        "--set training.seed=true": "training.seed=True must be a whole number",
        "--set training.seed": "'training.seed' must have the form KEY=VALUE",
        "--set training.batch_size=0": "training.batch_size=0 must be at least 1",
        "--set training.gradient_accumulation_steps=3": "steps=3 must divide training.batch_size=4",
        "--set data.image_size=7": "image_size=7 must be at least 8",
        "--set sampling.steps=0": "steps=0 must be at least 1",
        "--set model.network.head_dim=0": "model.network: head_dim=0 must be at least 1",
        "--set model.network.norm_groups=0": "model.network: norm_groups=0 must be at least 1",
        "--set model.network.patch_size=0": "model.network: patch_size=0 must be at least 1",
        "--set model.network.num_res_blocks=-1": "model.network: num_res_blocks=-1 must be in 1..",
        "--set model.network.ff_mult=-1": "model.network: ... ff_mult=-1 at least 0",
        "--set model.network.channels=[-64,64]": "model.network: channels=[-64, 64] must be at least 1",
        "--set model.network.transformer_depth=[-1,1]": "model.network: transformer_depth=[-1, 1] must be at least 0",
        "--set model.network.out_channels=3": "model.network.out_channels=3 must be null or 1",
        "--set model.text_encoder.width=0": "model.text_encoder: width=0 must be at least 1",
        "--set model.text_encoder.heads=0": "model.text_encoder: heads=0 must be at least 1",
        "--dry_run --set clip.training.batch_size=0 --set model.text_encoder.pretrained=tiny": "clip.training.batch_size=0",
        "--ema": "--ema and --no-ema are of --load_model_weights_from_checkpoint, and there is none",
        "--set diffusion.min_snr_gamma=-5": "diffusion.min_snr_gamma=-5 must be above 0, or null",
        "--dry_run --set diffusion.min_snr_gamma=0": "diffusion.min_snr_gamma=0 must be above 0, or null",
        "--set optimizer.learning_rate=-1": "optimizer.learning_rate=-1 must be above 0",
        "--set optimizer.learning_rate=.inf": "optimizer.learning_rate=inf must be finite, above 0",
        "--set optimizer.betas=[2,3]": "optimizer.betas=[2, 3] must be two numbers in [0, 1)",
        "--seed 99999999999999999999": "training.seed=99999999999999999999 must be between -2^63 and 2^63",
        "--mixed_precision fp16": "training.mixed_precision=fp16 needs a GPU",
        "--set sampling.sampler.kind=ddim --set sampling.sampler.eta=5": "sampling.sampler: eta=5 must be in [0, 1]",
        "--dry_run --set sampling.cfg_scale=.nan": "sampling: cfg_scale=nan must be a finite number",
        "--set sampling.times.t_max=5": "sampling.times: t_max=5 must be above 0 and at most 1",
        "--set model.text_encoder.pretrained=openai": "pretrained='openai' ... allowed are tiny, null, or a",
        "--dataset_name image/digitz": "'image/digitz' ... image/digits, image/mnist ... also with _inverted",
        "--dataset_name image/mnist --data_dir nowhere": "image/mnist ... --data_dir nowhere ... image/digits",
        "--config_path nothing.yaml": "no config file at nothing.yaml (in the working folder /",
        "--config_path {folder}": "runs is a folder, not a config file; it holds: config.yaml",
        "--config_path {folder}/confg.yaml": "no config file at ... confg.yaml; there are: config.yaml",
        "--resume_from {folder}": "runs is a folder, not a checkpoint; it holds: diffusion-9.safetensors, diffusion-10.",
        BASE + " {folder}": "runs is a folder, not a checkpoint; it holds: diffusion-9.safetensors, diffusion-10.",
        "--data_dir somewhere": "--data_dir somewhere: ... data.data_dir is unknown; allowed: kind, image_size",
        "--num_training_steps 0": "--num_training_steps ... '0' ... at least 1",
        "--batch_size many": "--batch_size ... 'many' ... at least 1",
        "--mixed_precision fp8": "--mixed_precision ... 'fp8' ... bf16",
        "--resume_from nothing.safetensors": "no checkpoint at nothing.safetensors",
        "--resume_from {text}": "text.safetensors is no safetensors file: it begins with",
        "--use_lora_training": f"--use_lora_training adapts a trained model ... {BASE}",
        LORA + " {checkpoint}.pt": "no checkpoint at ... there are: diffusion-2.safetensors",
        LORA + " {lora}": "diffusion-2-lora.safetensors is a LoRA",
        LORA + " {checkpoint} --set lora.target_modules=[to_x]": "LoRA targets ['to_x']; allowed: attention",
        LORA + " {checkpoint} --set lora.rank=0": "rank=0 must be in 1..",
        LORA + " {checkpoint} --set lora.alpha=0": "lora_alpha=0 of ... to_q must be a number other than 0",
        BASE + " {checkpoint} --set model.network.channels=[16,32]":
            "diffusion-2.safetensors ... another architecture: model.network.channels=[16, 16] there, [16, 32] in the",
        BASE + " {other_weights}": "other_weights.pt is a checkpoint for another architecture",
        BASE + " {no_weights}": "no_weights.pt holds no state dict",
    },
    SAMPLE: {
        "--sampler ddmi": "'ddmi' is unknown, did you mean ddim?; allowed: ancestral, ddim, heun, dpm_solver",
        "--prompt 'a {{clas}}'": "unknown slot {clas}; allowed: {class}",
        "--num_samples 0": "--num_samples ... '0' ... at least 1",
        "--guidance much": "--guidance ... 'much'",
        "--guidance nan": "--guidance ... 'nan' must be a finite number",
        "--set sampling.cfg_scale=.inf": "sampling: cfg_scale=inf must be a finite number",
        "--sampler ddim --set sampling.sampler.eta=.nan": "sampling.sampler: eta=nan must be in [0, 1]",
        "--prompt 'a {{class'": "'a {class' has a brace without its other one; allowed: {class}",
        "--set sampling.steps=0": "steps=0 must be at least 1",
        "--sampler ddim --set sampling.sampler.eta=5": "eta=5 must be in [0, 1]",
        "--times karras --set sampling.times.rho=0": "sampling.times: ... rho=0: need 0 < sigma_min",
        "--times logsnr --set sampling.times.logsnr_max=-20": "sampling.times: logsnr_max=-20 must be above",
        "--set model.network.patch_size=2": "'model.network.patch_size=2': only keys of the section sampling:",
        "--config_path {config}": "another architecture: ... [16, 16] there, [64, 64] in the config",
        "--checkpoint {checkpoint}.pt": "no checkpoint at ... there are: diffusion-2.safetensors",
        "--checkpoint .": ". is a folder, not a checkpoint; it holds none",
        "--checkpoint {folder}": "runs is a folder, not a checkpoint; it holds: diffusion-9.safetensors, diffusion-10.",
        "--checkpoint {text}": "text.safetensors is no safetensors file: it begins with",
        "--checkpoint {truncated}": "truncated.safetensors is not a whole safetensors file",
        "--checkpoint {pickled}": "pickled.safetensors is no safetensors file: it begins with",
        "--checkpoint {damaged}": "damaged.pt is not a torch file of plain weights",
        "--checkpoint {other_weights}": "other_weights.pt carries no config ... --config_path",
        "--checkpoint {lora}": "diffusion-2-lora.safetensors is a LoRA ... --lora_path",
        "--lora_path nothing.safetensors": "no LoRA at nothing.safetensors (in the working folder /",
        "--lora_path {folder}": "runs is a folder, not a LoRA; it holds: diffusion-9",
        "--lora_path {checkpoint}": "diffusion-2.safetensors is a model, not a LoRA: sample.py takes it as --checkpoint",
        "--lora_path {text}": "text.safetensors is no safetensors file: it begins with",
        "--lora_path {lora} --checkpoint {other_base}": "-lora.safetensors was trained on another base",
        "--lora_path {lora} --checkpoint {other_process}": "-lora.safetensors was trained on another base",
        "--lora_path {matches_nothing}": "matches_nothing.safetensors does not fit this model ... such as elsewhere.",
        "--lora_path {changes_nothing}": "changes_nothing.safetensors: every lora_B is zero",
        "--lora_path {lora}:strong": "'strong' ... must be a number",
    },
    EVALUATE: {
        "--num_samples 1": "--num_samples 1 ... at least 2",
        "--num_samples 19 --full": "--num_samples 19 ... at least 20",
        "--intervals 1": "--intervals 1 ... at least 2",
        "--clip ViT": "--clip 'ViT' ... own ... ViT-B-32-quickgelu/openai",
        "--data_dir somewhere": "--data_dir somewhere: ... data.data_dir is unknown; allowed: kind, image_size",
        "--training_data_dir somewhere": "--training_data_dir somewhere ... image/digits has a training split",
        "--report {text}/out.html": "cannot write to ... text.safetensors",
        "--images_path {folder}": "--images_path ... holds files already ... an empty or a new folder",
        "--images_path {text}": "cannot write to ... text.safetensors",
        "--dataset_name image/digit": "'image/digit' is unknown, did you mean image/digits?",
        "--dataset_name image/cifar10 --data_dir nowhere": "image/cifar10 ... --data_dir nowhere ... image/digits",
        "--lora_path {lora} --checkpoint {other_base}": "-lora.safetensors was trained on another base",
        "--lora_path {lora} --checkpoint {other_process}": "-lora.safetensors was trained on another base",
    },
    DEMO: {"--num_samples 1": "--num_samples ... '1' ... at least 2"},
    TRAIN_CLIP: {
        "--num_training_steps 0": "--num_training_steps ... '0' ... at least 1",
        "--dataset_name image/digit": "'image/digit' is unknown, did you mean image/digits?",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tiny_run, tmp_path_factory):
    """command(script, words): the words of a command that would work, then `words` with the paths of prepared files."""
    folder = tmp_path_factory.mktemp("bad")
    named = {"checkpoint": tiny_run.checkpoint, "lora": tiny_run.lora, "config": tiny_run.config_path}

    def path(name: str) -> Path:
        named[name.partition(".")[0]] = folder / name
        return folder / name

    path("runs").mkdir()
    named["folder"] = named.pop("runs")
    for name in ("config.yaml", "diffusion-9.safetensors", "diffusion-10.safetensors"):
        (named["folder"] / name).touch()
    path("text.safetensors").write_text("this is no checkpoint")
    path("truncated.safetensors").write_bytes(tiny_run.checkpoint.read_bytes()[:-1000])
    path("pickled.safetensors").write_bytes(pickle.dumps({"a": 1}))
    path("damaged.pt").write_bytes(b"PK\x03\x04 no zip file")
    torch.save({"step": 3}, path("no_weights.pt"))
    torch.save({"network.conv_in.weight": torch.zeros(3)}, path("other_weights.pt"))
    base, lora = load_model_file(tiny_run.checkpoint), read_lora(tiny_run.lora)
    tensors = {name: tensor + 1 for name, tensor in base.tensors.items()}
    save_model(path("other_base.safetensors"), tensors, config=base.config, image_shape=base.image_shape, step=2)
    process = base.config["diffusion"] | {"schedule": {"kind": "betas"}}
    config = base.config | {"diffusion": process}
    save_model(path("other_process.safetensors"), tensors, config=config, image_shape=base.image_shape, step=2)
    elsewhere = {f"elsewhere.{name}": factors for name, factors in lora.modules.items()}
    write_lora(replace(lora, modules=elsewhere, base_hash=None), path("matches_nothing.safetensors"), "native")
    zeros = {name: replace(f, lora_B=torch.zeros_like(f.lora_B)) for name, f in lora.modules.items()}
    write_lora(replace(lora, modules=zeros, base_hash=None), path("changes_nothing.safetensors"), "native")

    training = ["--config_path", str(tiny_run.config_path), *set_words(tiny_run.overrides)]
    model = ["--checkpoint", str(tiny_run.checkpoint)]
    needed = {TRAIN: training, TRAIN_CLIP: training, SAMPLE: model, EVALUATE: model, DEMO: []}
    return lambda script, words: needed[script] + [word.format(**named) for word in shlex.split(words)]


def message_of(err: str) -> str:
    """The one line on stderr."""
    assert "Traceback" not in err
    (message,) = err.rstrip("\n").split("\n")
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(("script", "words"), [(script, words) for script, cases in BAD_INPUT.items() for words in cases])
def test_one_line_status_2_and_nothing_written(script, words, command, work_folder, capsys):
    assert run_script(script, *command(script, words)) == 2
    message = message_of(capsys.readouterr().err)
    pieces = BAD_INPUT[script][words].split(" ... ")
    assert re.search(".*".join(map(re.escape, pieces)), message), message
    assert files_in(work_folder) == set()


@pytest.mark.parametrize("script", [TRAIN, TRAIN_CLIP, SAMPLE])
@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_unwritable_output_folder(script, below, command, work_folder, capsys):
    """Below a regular file, because tests may run as root, who can write anywhere else."""
    (work_folder / "file").write_text("kept")
    output = f"file{below}/clip.safetensors" if script == TRAIN_CLIP else f"file{below}"
    folder = f"file{below}"
    assert run_script(script, *command(script, f"--output_path {output}")) == 2
    message = message_of(capsys.readouterr().err)
    assert re.match(rf"error: cannot write to {folder}: (/.*/)?file is a file, not a folder", message)
    assert files_in(work_folder) == {"file"}
    assert (work_folder / "file").read_text() == "kept"


def test_a_failed_start_leaves_an_earlier_run_as_it_was(command, work_folder):
    assert run_script(TRAIN, *command(TRAIN, "--output_path run")) == 0
    before = {name: (work_folder / name).read_bytes() for name in files_in(work_folder)}
    for words in (f"{BASE} {{text}}", "--set sampling.steps=0", "--resume_from {lora}"):
        assert run_script(TRAIN, *command(TRAIN, f"--output_path run --seed 7 {words}")) == 2
    assert {name: (work_folder / name).read_bytes() for name in files_in(work_folder)} == before


@pytest.mark.parametrize(
    ("script", "words"),
    [(TRAIN, "--set optimizer.learning_rat=1"), (SAMPLE, "--num_samples 0"), (SAMPLE, "--checkpoint {text}")],
)
def test_the_same_in_a_process_of_its_own(script, words, command, work_folder):
    done = run_process(script, *command(script, words))
    assert done.returncode == 2
    assert done.stdout == ""
    assert BAD_INPUT[script][words].split(" ... ")[-1] in message_of(done.stderr)


class Intruder:
    """Unpickling this would create a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("flag", ["--checkpoint", "--lora_path"])
def test_code_in_a_pickle_is_not_run(flag, write, name, command, work_folder, capsys):
    marker = work_folder / "intruder"
    write({"network.conv_in.weight": Intruder(marker)}, work_folder / name)
    assert run_script(SAMPLE, *command(SAMPLE, f"{flag} {name}")) == 2
    assert name in message_of(capsys.readouterr().err)
    assert not marker.exists()
    if write is not torch.save:
        pickle.loads((work_folder / name).read_bytes())  # the file is what it pretends to be
        assert marker.exists()


# --- a loss that is no number: not a user's mistake, so status 1 ---


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(command, work_folder, capsys, monkeypatch):
    calls = []

    def loss(*arguments, **keywords):
        calls.append(keywords)
        return real_loss(*arguments, **keywords) * (math.nan if len(calls) == 6 else 1)

    real_loss = diffusion_task.loss
    monkeypatch.setattr(diffusion_task, "loss", loss)
    words = "--output_path run --num_training_steps 8 --save_and_sample_every_n 2"
    assert run_script(TRAIN, *command(TRAIN, words)) == 1
    assert re.fullmatch(
        "error: training stopped after step 5, loss nan.* at step 6; last good checkpoint: run/diffusion-4.safetensors; "
        "to go on from it: python .* --resume_from auto",
        capsys.readouterr().err.splitlines()[-1],
    )
    assert len(calls) == 6
    weights = {name for name in files_in(work_folder / "run") if name.startswith("diffusion")}
    assert weights == {f"diffusion-{step}.{ending}" for step in (2, 4) for ending in ("safetensors", "state.pt")}
    model, _ = load_model(work_folder / "run/diffusion-4.safetensors")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    metrics = [json.loads(line) for line in (work_folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(m["loss"]) for m in metrics)


def test_an_absurd_learning_rate_is_caught(command, work_folder, capsys):
    words = "--output_path run --num_training_steps 20 --save_and_sample_every_n 20 --set optimizer.learning_rate=1e18"
    assert run_script(TRAIN, *command(TRAIN, words)) == 1
    last_line = capsys.readouterr().err.splitlines()[-1]
    stopped = r"error: training stopped after step \d+, .* at step \d+; last good checkpoint: none"
    assert re.fullmatch(stopped, last_line)
    assert not [name for name in files_in(work_folder / "run") if name.endswith((".safetensors", ".pt", ".tmp"))]
