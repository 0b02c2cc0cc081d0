"""The training command, stopped and resumed: every file is, bit for bit, that of the run which nobody stopped."""

import shlex
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import ROOT, TRAIN, run_script, set_words
from test_state import fresh

from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.training import previews, run
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run

CONFIG = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
STEPS = 5
TINY = [
    "data.image_size=12", "model.network.channels=[16,16]", "model.network.head_dim=8", "model.network.norm_groups=4",
    "model.network.patch_size=1", "model.text_encoder.width=8", "model.text_encoder.layers=1",
    "model.text_encoder.pretrained=null", "optimizer.warmup_steps=2", "sampling.steps=1", "training.batch_size=4",
]  # fmt: skip
COMMON = ["--config_path", CONFIG, "--force_cpu", "--num_training_steps", STEPS, "--save_and_sample_every_n", 2]
COMMON += set_words(TINY)
VARIANTS = {
    "base": [],
    "base, accumulated, bf16": ["--mixed_precision", "bf16", *set_words(["training.gradient_accumulation_steps=2"])],
    "lora": ["--use_lora_training", *set_words(["lora.dropout=0.2", "lora.target_modules=attention"])],
    "pissa": ["--use_lora_training", *set_words(["lora.init=pissa", "lora.target_modules=attention"])],
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(words, tmp_path, evidence, signals, capfd):
    base = tmp_path / "base"
    if "--use_lora_training" in words:
        assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", base) == 0
        words = [*words, "--load_model_weights_from_checkpoint", base / "diffusion-1.safetensors"]
    whole, cut = ([*COMMON, *words, "--output_path", tmp_path / name] for name in ("whole", "cut"))
    assert run_script(TRAIN, *whole) == 0

    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *cut, "--resume_from", "auto") == 130
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("stopped by SIGINT after step 3; to go on: python ")
    assert line.endswith(" --resume_from auto")
    assert line.count("--resume_from") == 1
    assert [m["step"] for m in read_metrics(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3]
    signals[4] = signal.SIGTERM
    assert run_script(TRAIN, *cut, "--resume_from", "auto") == 143
    assert run_script(TRAIN, *cut, "--resume_from", "auto") == 0

    expected, found = evidence(tmp_path / "whole"), evidence(tmp_path / "cut")
    extra = found.keys() - expected.keys()
    assert {name.split(".")[0].removesuffix("-lora") for name in extra} == {"diffusion-3"}
    assert {name: found[name] for name in expected} == expected
    statuses = [(s["status"], s["first_step"], s["last_step"]) for s in read_run(tmp_path / "cut")["segments"]]
    assert statuses == [("interrupted", 1, 3), ("interrupted", 4, 4), ("finished", 5, 5)]


def test_a_run_that_was_moved_goes_on_with_the_text_encoder_of_its_checkpoint(work_folder, evidence, signals, capfd):
    """Another machine has no tiny CLIP, and would train one that differs by rounding; nor can it always download one."""
    clip = ["clip.training.num_training_steps=2", "clip.training.batch_size=10", "clip.optimizer.warmup_steps=0"]
    words = [*COMMON, *set_words(["model.text_encoder.pretrained=tiny", *clip]), "--output_path"]
    assert run_script(TRAIN, *words, "whole") == 0
    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *words, "cut") == 130
    shutil.rmtree("output")
    capfd.readouterr()
    assert run_script(TRAIN, *words, "cut", "--resume_from", "auto") == 0
    assert "text encoder: that of cut/diffusion-3.safetensors" in capfd.readouterr().out
    assert not Path("output").exists()
    expected, found = evidence(Path("whole")), evidence(Path("cut"))
    assert {name: found[name] for name in expected} == expected


def test_a_folder_by_another_name_is_the_same_run_s(tmp_path, monkeypatch):
    """Else its own metrics and states would be put aside for those of another run."""
    trainer, checkpoints = fresh(tmp_path / "run")
    checkpoints.save(trainer, 1)
    checkpoints.finish()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for name in ("run", "link", str(tmp_path / "run")):
        assert checkpoints.resume(trainer, f"{name}/diffusion-1.safetensors") == 1
        assert checkpoints.origin == checkpoints.folder
    (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoints.resume(trainer, "moved/diffusion-1.safetensors") == 1
    assert checkpoints.origin == Path("moved")


def test_a_signal_in_the_last_step_leaves_a_whole_run(tmp_path, signals, capfd):
    signals[STEPS] = signal.SIGINT
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path) == 130
    assert (tmp_path / f"samples/sample-{STEPS}.png").is_file()
    assert capfd.readouterr().err.splitlines()[-1] == f"stopped by SIGINT after step {STEPS}; the last"
    assert [s["status"] for s in read_run(tmp_path)["segments"]] == ["finished"]
    assert run_script(TRAIN, *COMMON, "--output_path", tmp_path, "--resume_from", "auto") == 0
    assert f"the run in {tmp_path} has taken all of its {STEPS} steps" in capfd.readouterr().out


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", tmp_path) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_fresh_run_in_an_old_folder_does_not_resume_the_old_one(tmp_path, signals, capfd):
    """Nor do its checkpoints, of later steps, count as the newest of the new one."""
    words = [*COMMON, "--output_path", tmp_path, "--set", "checkpoints.keep_last=1"]
    assert run_script(TRAIN, *words, "--resume_from", "auto") == 0
    captured = capfd.readouterr()
    assert f"no checkpoint in {tmp_path} yet: starting afresh" in captured.out and "earlier run" not in captured.err
    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *words, "--seed", 1) == 130
    assert f"{tmp_path} holds an earlier run up to step {STEPS}: its states are set aside" in capfd.readouterr().err
    assert run_script(TRAIN, *words, "--seed", 1, "--resume_from", "auto") == 0
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert read_run(tmp_path)["segments"][-1]["first_step"] == 4


def test_a_run_that_goes_on_in_a_folder_of_another_is_one_run(tmp_path, signals, evidence, capfd):
    """Its metrics and segments come from where its checkpoint lies; no checkpoint of the other is found any more."""
    other, origin = tmp_path / "other", tmp_path / "origin"
    often = ["--save_and_sample_every_n", 1]  # before the step that is gone on with, too
    assert run_script(TRAIN, *COMMON, *often, "--seed", 1, "--output_path", other) == 0
    assert run_script(TRAIN, *COMMON, "--output_path", origin) == 0
    capfd.readouterr()
    signals[3] = signal.SIGINT
    words = [*COMMON, "--output_path", other, "--resume_from"]
    assert run_script(TRAIN, *words, origin / "diffusion-2.safetensors") == 130
    assert f"{other} holds an earlier run up to step {STEPS}: its states are set aside" in capfd.readouterr().err
    expected, found = evidence(origin), evidence(other)
    assert found["metrics"] == expected["metrics"][:3]
    states = [name for name in found if name.endswith(".state.pt")]
    assert sorted(states) == ["diffusion-2.state.pt", "diffusion-3.state.pt"]
    names = ("diffusion-2.state.pt", "diffusion-2.safetensors")
    assert [found[name] for name in names] == [expected[name] for name in names]
    assert [(s["status"], s["first_step"]) for s in read_run(other)["segments"]] == [
        ("finished", 1),
        ("interrupted", 3),
    ]
    assert read_run(other)["config"]["training"]["seed"] == 0
    assert run_script(TRAIN, *words, "auto") == 0
    name = f"diffusion-{STEPS}.state.pt"
    assert evidence(other)[name] == expected[name]


def test_resuming_under_other_conditions_is_said(tmp_path, signals, capfd):
    signals[3] = signal.SIGINT
    words = [*COMMON, "--output_path", tmp_path, "--resume_from", "auto"]
    run_script(TRAIN, *words)
    capfd.readouterr()
    assert run_script(TRAIN, *words, "--set", "optimizer.learning_rate=1e-5") == 0
    assert "resumed under other conditions: optimizer.learning_rate=0.004 before, 1e-05 now" in capfd.readouterr().err
    config = (tmp_path / "config.yaml").read_text()
    assert "learning_rate: 1.0e-05" in config
    assert run_script(TRAIN, *words, "--set", "optimizer.learning_rate=7") == 0  # it has taken all of its steps
    assert (tmp_path / "config.yaml").read_text() == config


def test_the_config_yaml_of_a_lora_run_repeats_it(tmp_path, signals, capfd):
    """What the command line beat of lora.training and lora.optimizer is not laid over it once more."""
    base, folder = tmp_path / "base", tmp_path / "lora"
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", base) == 0
    words = ["--use_lora_training", "--load_model_weights_from_checkpoint", base / "diffusion-1.safetensors"]
    words += ["--force_cpu", "--output_path", folder]
    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *COMMON, *words, *set_words(["optimizer.learning_rate=0.00123"])) == 130
    capfd.readouterr()
    assert run_script(TRAIN, "--config_path", folder / "config.yaml", *words, "--resume_from", "auto") == 0
    assert "other conditions" not in capfd.readouterr().err
    config = read_run(folder)["config"]
    assert (config["optimizer"]["learning_rate"], config["training"]["num_training_steps"]) == (0.00123, STEPS)


def test_training_on_from_a_files_weights_leaves_the_file(tmp_path):
    """They are mapped from it, and changed in memory alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_script(TRAIN, *COMMON, "--num_training_steps", 1, "--output_path", first) == 0
    file = first / "diffusion-1.safetensors"
    before = file.read_bytes()
    words = ["--load_model_weights_from_checkpoint", file, "--output_path", second]
    assert run_script(TRAIN, *COMMON, *words) == 0
    assert file.read_bytes() == before
    old, new = (load_safetensors(path)[0] for path in (file, second / f"diffusion-{STEPS}.safetensors"))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"network"}


def test_an_adapter_does_not_replace_the_records_of_its_base(tmp_path, capfd):
    words = [*COMMON, "--num_training_steps", 2, "--output_path", tmp_path]
    assert run_script(TRAIN, *words) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    base = ["--load_model_weights_from_checkpoint", tmp_path / "diffusion-2.safetensors"]
    adapt = [*words, *base, "--use_lora_training", "--set", "lora.target_modules=attention"]
    for more in ([], ["--resume_from", "auto"]):
        assert run_script(TRAIN, *adapt, *more) == 2
        error = f"error: {tmp_path} holds a run of another kind (diffusion-2.state.pt)"
        assert capfd.readouterr().err.splitlines()[-1].startswith(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_going_on_from_an_earlier_step_says_what_becomes_of_the_later_ones(tmp_path, monkeypatch, signals, capfd):
    """And the line that says how to go on names the script from where the command was given."""
    words = [*COMMON, "--output_path", "run"]
    monkeypatch.chdir(tmp_path)
    assert run_script(TRAIN, *words) == 0
    signals[3] = signal.SIGINT
    assert run_script(TRAIN, *words, "--resume_from", "run/diffusion-2.safetensors") == 130
    error = capfd.readouterr().err
    assert f"run holds later steps, up to {STEPS}: their states are set aside, their lines leave metrics.jsonl" in error
    script = shlex.split(error.splitlines()[-1].partition("to go on: ")[2])[1]
    assert (tmp_path / script).resolve() == ROOT / TRAIN


def test_what_is_written_until_the_folder_is_free_is_gone_on_from(tmp_path, monkeypatch, capfd):
    """A scheduler may start the next job while the last one writes its checkpoint."""
    words = [*COMMON, "--output_path", tmp_path, "--resume_from", "auto"]
    assert run_script(TRAIN, *words, "--num_training_steps", 4) == 0
    (tmp_path / "diffusion-4.state.pt").rename(tmp_path / "later")

    @contextmanager
    def held(folder):
        (tmp_path / "later").rename(folder / "diffusion-4.state.pt")
        yield

    monkeypatch.setattr(run, "held", held)
    assert run_script(TRAIN, *words) == 0
    assert "going on with step 5" in capfd.readouterr().out


def test_a_file_without_its_run_says_that_the_conditions_are_not_known(tmp_path, capfd):
    words = [*COMMON, "--num_training_steps", 2]
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "run") == 0
    (tmp_path / "alone").mkdir()
    for suffix in ("safetensors", "state.pt"):
        (tmp_path / f"run/diffusion-2.{suffix}").rename(tmp_path / f"alone/diffusion-2.{suffix}")
    words = [*COMMON, "--output_path", tmp_path / "new", "--resume_from", tmp_path / "alone/diffusion-2.safetensors"]
    assert run_script(TRAIN, *words, "--set", "optimizer.learning_rate=1e-3") == 0
    assert f"{tmp_path / 'alone'} holds no run.json: whether it was begun under these conditions is not known" in (
        capfd.readouterr().err
    )
    (tmp_path / "new/run.json").write_text("{")
    words = [*COMMON, "--num_training_steps", STEPS + 1, "--output_path", tmp_path / "new", "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 2
    assert f"the run goes on without it if {tmp_path / 'new/run.json'} is moved away" in capfd.readouterr().err


def test_a_picture_of_an_earlier_run_does_not_stay_beside_new_weights(tmp_path, monkeypatch):
    words = [*COMMON, "--num_training_steps", 2, "--output_path", tmp_path]
    assert run_script(TRAIN, *words) == 0

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(previews, "draw_sample_grid", killed)
        assert run_script(TRAIN, *words, "--seed", 5) == 130
    assert not (tmp_path / "samples/sample-2.png").exists()
    assert run_script(TRAIN, *words, "--seed", 5, "--resume_from", "auto") == 0
    assert (tmp_path / "samples/sample-2.png").is_file()


def test_no_step_left_replaces_nothing(tmp_path, capfd):
    words = [*COMMON, "--output_path", tmp_path]
    assert run_script(TRAIN, *words) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.name != "run.json"}
    few = ["--num_training_steps", 1, "--resume_from", tmp_path / "diffusion-2.safetensors"]
    assert run_script(TRAIN, *words, *few) == 0
    assert "has taken all of its 1 steps, and 1 more" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_warm_up_that_never_ends_is_said(tmp_path, capfd):
    words = [*COMMON, "--num_training_steps", 2, "--output_path", tmp_path, *set_words(["optimizer.warmup_steps=4"])]
    assert run_script(TRAIN, *words) == 0
    assert "optimizer.warmup_steps=4 takes all of the 2 steps: its learning rate ends at 50% of the peak" in (
        capfd.readouterr().out
    )


def test_a_run_that_is_done_is_left_as_it_is(tmp_path, capfd):
    words = [*COMMON, "--num_training_steps", 2, "--output_path", tmp_path, "--resume_from", "auto"]
    assert run_script(TRAIN, *words) == 0
    assert run_script(TRAIN, *words, "--set", "optimizer.learning_rate=1e-3") == 0
    assert run_script(TRAIN, *words, "--num_training_steps", 1) == 0
    said = capfd.readouterr()
    assert f"the run in {tmp_path} has taken all of its 1 steps, and 1 more" in said.out
    assert "other conditions" not in said.err
    assert not any(segment.get("changes") for segment in read_run(tmp_path)["segments"])
