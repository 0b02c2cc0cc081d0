"""Weights in shares (FSDP), by two real processes (gloo, this machine): the run, and the files, are those of one."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from commands import SAMPLE, TRAIN, run_script, set_words
from picture_folders import write_pictures
from test_multiprocess import BOUND, curve, finish, start
from test_resume import COMMON
from test_sd_training import CONFIGS
from tiny import tiny_config, tiny_model, tiny_trainer
from tiny_sd import SMALLER, tiny_sd_model

from xdiffusion.build import load_config
from xdiffusion.checkpoints.hashes import plain_and_tensors
from xdiffusion.checkpoints.native import save_model
from xdiffusion.checkpoints.reading import load_pickled, load_safetensors
from xdiffusion.training.processes import check_shares
from xdiffusion.training.records import read_metrics
from xdiffusion.training.settings import TrainingSettings
from xdiffusion.training.sharded_weights import laid_out_as

STEPS = 3  # with a checkpoint at 2
WORDS = [
    *COMMON,
    "--num_training_steps",
    STEPS,
    "--batch_size",
    8,
    *set_words(["training.gradient_accumulation_steps=2"]),
]
SHARDED = ["--set", "training.shard_weights=true"]


def train_in_two(words, folder):
    """What the first of two processes with sharded weights prints."""
    processes = start([*words, *SHARDED, "--output_path", folder])
    statuses, outputs, errors = zip(*(finish(process, 4 * BOUND) for process in processes))
    assert statuses == (0, 0), errors
    return outputs[0]


def forget_last(folder, copy=None):
    """Take a run, or a copy of it, back to the checkpoint before its last."""
    folder = shutil.copytree(folder, copy) if copy else folder
    for kind in ("safetensors", "state.pt"):
        (folder / f"diffusion-{STEPS}.{kind}").unlink()
    return folder


def assert_same_run(folder, expected):
    for key in ("loss", "grad_norm"):
        runs = [[m[key] for m in read_metrics(f / "metrics.jsonl")] for f in (folder, expected)]
        assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    weights = [load_safetensors(f / f"diffusion-{STEPS}.safetensors")[0] for f in (folder, expected)]
    states = [load_pickled(f / f"diffusion-{STEPS}.state.pt") for f in (folder, expected)]
    plain, tensors = zip(*map(plain_and_tensors, states))
    assert plain[0].keys() == plain[1].keys()
    for ours, theirs in (weights, tensors):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's FSDP2 runs on GPUs only")
def test_two_processes_with_half_the_weights_each_are_one_with_all(tmp_path):
    """Losses, files and pictures; a run goes on with one process where two stopped, and with two where one did."""
    assert run_script(TRAIN, *WORDS, "--output_path", tmp_path / "one") == 0
    printed = train_in_two(WORDS, tmp_path / "two")
    mine, whole = (int(n.replace(",", "")) for n in re.search(r"sharded weights: (\S+) of (\S+) in", printed).groups())
    assert 0.45 * whole < mine < 0.55 * whole
    assert f"network {whole:,}," in printed
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / f"two/samples/sample-{STEPS}.png").is_file()
    model = tmp_path / f"two/diffusion-{STEPS}.safetensors"
    assert run_script(SAMPLE, "--checkpoint", model, "--num_samples", 2, "--output_path", tmp_path / "pictures") == 0

    of_one = forget_last(tmp_path / "one", tmp_path / "two_after_one")
    of_two = forget_last(tmp_path / "two", tmp_path / "one_after_two")
    assert run_script(TRAIN, *WORDS, *SHARDED, "--output_path", of_two, "--resume_from", "auto") == 0
    train_in_two([*WORDS, "--resume_from", "auto"], of_one)
    for folder in (of_one, of_two):
        assert len(curve(folder)) == STEPS
        assert_same_run(folder, tmp_path / "one")


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's FSDP2 runs on GPUs only")
def test_all_weights_of_stable_diffusion_are_trained_in_two_shares(work_folder):
    """From a base, with latents of the cache that both processes fill."""
    config = CONFIGS / "sd15_tiny.yaml"
    model = tiny_sd_model(load_config(config, SMALLER))
    save_model(work_folder / "base.safetensors", model.state_dict(), config={}, image_shape=model.image_shape, step=0)
    write_pictures(work_folder / "set", [(32, 32)] * 4, ["a", "b", "c", "d"])
    more = ["cache.latents=true", f"training.num_training_steps={STEPS}", "optimizer.learning_rate=1e-3"]
    words = ["--config_path", config, "--data_dir", "set", "--force_cpu", *set_words([*SMALLER, *more])]
    words += ["--load_model_weights_from_checkpoint", "base.safetensors", "--output_path"]
    assert run_script(TRAIN, *words, "one", "--set", f"cache.folder={work_folder / 'of_one'}") == 0
    two = start([*words, "two", "--set", f"cache.folder={work_folder / 'of_two'}", *SHARDED])
    statuses, outputs, errors = zip(*(finish(process, 4 * BOUND) for process in two))
    assert statuses == (0, 0), errors
    assert "sharded weights: " in outputs[0]
    assert curve(work_folder / "two") == pytest.approx(curve(work_folder / "one"), rel=1e-4)
    one, shared = (load_safetensors(work_folder / f / f"diffusion-{STEPS}.safetensors")[0] for f in ("one", "two"))
    assert one.keys() == shared.keys() and all(torch.allclose(one[n], shared[n], atol=1e-3) for n in one)
    assert not all(torch.equal(one[n], tensor) for n, tensor in model.state_dict().items() if n.startswith("network"))


@pytest.mark.parametrize(
    ("overrides", "lora", "reason"),
    [
        ([], True, "a LoRA, a learned word or the tiny CLIP is small: leave it false"),
        (["training.mixed_precision=fp16"], False, "does not go with training.mixed_precision=fp16; take bf16"),
        (["training.compile=true"], False, "does not go with training.compile=True; take false"),
        (["optimizer.kind=adamw8bit"], False, "does not go with optimizer.kind=adamw8bit; take adamw"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, lora, reason):
    """On one process too, where it has no effect."""
    config = tiny_config("training.shard_weights=true", *overrides)
    with pytest.raises(ValueError, match=f"training.shard_weights=true .*{reason}"):
        tiny_trainer(config, lora=lora)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_launcher_that_would_share_out_weights_is_told_the_key(kind):
    accelerator = SimpleNamespace(num_processes=2, distributed_type=kind)
    with pytest.raises(ValueError, match=f"distributed type {kind.value}: .* set training.shard_weights=true"):
        check_shares(accelerator, SimpleNamespace(settings=TrainingSettings(), rows=8))


def test_the_blocks_hold_nearly_all_weights_once():
    network = tiny_model(tiny_config("model.network.resample=resample")).network
    ids = [id(p) for block in network.blocks() for p in block.parameters()]
    assert len(set(ids)) == len(ids)
    outside = {name.split(".")[0] for name, p in network.named_parameters() if id(p) not in ids}
    assert outside == {"conv_in", "time_embedding", "conv_norm_out", "conv_out"}


def test_moments_lie_in_memory_as_their_weight_does():
    weight = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    moment = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
    laid_out = laid_out_as(weight, moment)
    assert laid_out.stride() == weight.stride()
    assert torch.equal(laid_out, moment)
