"""Every benchmark at its smallest settings: it runs, and its lines can be read by a program."""

import importlib
import json
import math
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from tiny import SIZE, tiny_images

from xdiffusion.build import build_model, load_config
from xdiffusion.checkpoints.native import save_model
from xdiffusion.evaluation.judge import train_judge

MACHINE = {"device", "threads", "torch"}
FIELDS = {"figure", "unit", "ours", "theirs", "ratio", "goal", "goal_is", "met"} | MACHINE
SMALLEST = ["--rounds", "1", "--threads", "1", "--json"]
TINY_CONFIG = [
    "data.image_size=8", "model.network.channels=[8,8]", "model.network.head_dim=8", "model.network.norm_groups=4",
    "model.network.patch_size=1", "model.text_encoder.layers=1", "model.text_encoder.width=8",
    "clip.training.num_training_steps=1", "training.batch_size=4", "sampling.steps=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other from their own folder."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield
    for name in ("measure", "peers", "parity_sd", "schedulers"):
        sys.modules.pop(name, None)


@pytest.fixture
def quick_judge(monkeypatch):
    """A judge that has hardly been trained."""
    monkeypatch.setattr("xdiffusion.scoring.train_judge", partial(train_judge, steps=3))


def load(script):
    """A script as a module."""
    name = f"bench_{script}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results(capsys, script, *words):
    """The figures that a script prints, by name, each with all its fields."""
    assert load(script).main([*SMALLEST, *map(str, words)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        assert line.keys() >= FIELDS, line
        for side in ("ours", "theirs"):
            assert 0 <= line[side]["min"] <= line[side]["median"] <= line[side]["max"] < math.inf, line
    return {line["figure"]: line for line in lines}


def test_train_step(capsys):
    found = results(capsys, "train_step", "--size", "tiny", "--calls", 1, "--skip_resident")
    assert found.keys() == {"train_step_tiny", "lora_step_tiny"}
    for figure in found.values():
        assert figure["parameters_ours"] == figure["parameters_theirs"]
        assert figure["largest_relative_difference"] < 1e-4
        assert 0 < figure["ratio_at_that_speed"] < figure["ratio"]
        floor = figure["gflop"] / figure["gflop_per_s_of_a_product"] / figure["theirs"]["median"]
        assert figure["ratio_at_that_speed"] == pytest.approx(floor, rel=0.01)


@pytest.mark.slow
def test_resident_memory_in_a_fresh_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert load("train_step").resident_in_fresh_process("tiny", "lora", "ours", threads=1) > 0


def test_sample(capsys, tiny_run, work_folder, quick_judge):
    few = ["--batch_size", 2, "--num_samples", 10]
    found = results(capsys, "sample", "--size", "tiny", "--steps", 2, *few, "--checkpoint", tiny_run.checkpoint)
    assert found.keys() == {
        "sample_dpm_solver_2_tiny", "sample_ddim_2_tiny", "sample_equal_accuracy_tiny", "sample_equal_accuracy_checkpoint",
    }  # fmt: skip
    assert found["sample_ddim_2_tiny"]["largest_difference"] < 1e-3
    assert found["sample_dpm_solver_2_tiny"]["largest_difference"] < 1e-3
    assert found["sample_equal_accuracy_tiny"]["goal"] == 0.35
    of_checkpoint = found["sample_equal_accuracy_checkpoint"]
    assert 0 <= of_checkpoint["prompt_accuracy_theirs"] <= 1
    assert of_checkpoint["our_sampler"] == "ancestral 2 steps"  # its config's


def test_lora_linear(capsys):
    found = results(capsys, "lora_linear", "--shape", "512x32x64x4", "16384x128x128x4")
    differences = [f["largest_relative_difference"] for name, f in found.items() if "small_libraries" not in name]
    assert all(difference < 1e-5 for difference in differences)
    # bytes do not depend on how busy the machine is
    assert found["lora_linear_16384x128x128x4_peak"]["met"]
    # peft keeps x A^T, ours W + B A, in place of it
    saved = found["lora_linear_512x32x64x4_saved"]
    assert saved["theirs"]["median"] == pytest.approx(512 * 4 * 4 / 2**20, rel=1e-3)
    assert saved["ours"]["median"] == pytest.approx(32 * 64 * 4 / 2**20, rel=1e-3)


def test_data(capsys):
    found = results(capsys, "data", "--batch_size", 4, 8, "--batches", 1, "--image_size", 16)
    assert found.keys() == {"data_batch_4", "data_batch_8"}
    assert found["data_batch_8"]["goal_is"] == "ratio >= 30"


def test_data_reads_mnist(capsys, mnist8k):
    found = results(capsys, "data", "--batch_size", 4, "--batches", 1, "--data_dir", mnist8k)
    assert found["data_batch_4"]["dataset"] == "image/mnist"


@pytest.mark.slow
@pytest.mark.parametrize(("figure", "names"), [("help", {"help_train", "help_sample"}), ("first_step", {"first_step"})])
def test_startup(capsys, monkeypatch, figure, names):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = results(capsys, "startup", "--figure", figure)
    assert found.keys() == names
    assert all(line["goal_is"].startswith("ours <=") for line in found.values())


def test_time_to_quality(capsys, work_folder, quick_judge):
    settings = [word for override in [*TINY_CONFIG, "training.num_training_steps=2"] for word in ("--set", override)]
    limits = ["--num_samples", 10, "--max_seconds", 0.1, "--target", 1.0]
    config = ROOT / "configs/image/digits/ddpm_24x24_v_continuous_clip.yaml"
    (found,) = results(capsys, "time_to_quality", "--config_path", config, *settings, *limits).values()
    assert found["figure"] == "time_to_quality"
    assert found["reached_ours"] == found["reached_theirs"] == [False]
    assert found["ratio_is"].startswith("nothing") and not found["met"]
    assert found["parameters_theirs"] > 0 and found["history_ours"][0]


@pytest.mark.slow
def test_lora(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = results(capsys, "lora", "--num_samples", 1, "--rank", 1)
    assert {
        "lora_step_same_module",
        "lora_sampling_unmerged",
        "lora_sampling_merged",
        "lora_convert_kohya",
        "lora_convert_kohya_peak",
    } <= {*found}
    assert all(f["modules"] == 256 for name, f in found.items() if "convert" in name)


@pytest.mark.slow
def test_parity_sd(capsys):
    assert load("parity_sd").main(["--model", "sd15", "--steps", "2", "--threads", "1", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["met"], line
    parts = {"unet", "encode", "decode", "text_encoder", "gradients"}
    samplers = {f"txt2img {s}" for s in ("ddim", "euler", "euler_ancestral", "dpm_solver", "dpm_solver_karras")}
    assert line["errors"]["tiny"]["sd15"].keys() == parts | samplers


def test_parity_that_is_not_met_is_a_failure(capsys, monkeypatch):
    parity_sd = load("parity_sd")
    for error, status in ((1e-6, 0), (1e-4, 1)):
        monkeypatch.setattr(parity_sd, "parity", lambda *_, error=error: {"unet": error})
        assert parity_sd.main(["--json"]) == status
        assert json.loads(capsys.readouterr().out)["met"] == (status == 0)


def test_sd(capsys):
    few = ["--figure", "forward", "lora_file", "txt2img", "lora_step", "--steps", 2]
    found = results(capsys, "sd", "--size", "tiny", *few)
    timed = {"forward_batch_1_tiny", "forward_batch_2_tiny", "txt2img_tiny", "lora_step_tiny"}
    assert found.keys() == {"lora_parameters_tiny", *timed, *(f"{name}_peak" for name in timed)}
    assert found["forward_batch_2_tiny"]["largest_relative_difference"] < 1e-5
    assert found["txt2img_tiny"]["largest_difference"] < 1e-4
    lora = found["lora_parameters_tiny"]
    assert lora["parameters_ours"] == lora["parameters_theirs"] < lora["file_bytes"] / 4


@pytest.mark.slow
def test_sd_fits_in_a_fresh_process(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (found,) = results(capsys, "sd", "--size", "tiny", "--figure", "fits").values()
    assert found["met"] and found["lora_step_seconds"] > 0 and found["txt2img_2_steps_seconds"] > 0


def test_sd_loading(capsys, monkeypatch):
    """Of either kind of file."""
    script = load("sd_loading")

    def here(side, path, threads, dtype):  # where the growth of a process that is warm already says nothing
        return {**script.measure(side, path, script.DTYPES[dtype]), "peak": 1.0}

    monkeypatch.setattr(script, "in_a_process", here)
    for suffix in (".safetensors", ".ckpt"):
        assert script.main([*SMALLEST, "--model", "sd15_tiny", "--suffix", suffix]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["figure"] for line in lines] == ["load_seconds", "load_peak_over_file"]
        assert all(line.keys() >= FIELDS | {"file_bytes", "dtype"} and line["suffix"] == suffix for line in lines)


@pytest.mark.slow
def test_a_model_of_300_mb_is_loaded_without_a_second_copy(tmp_path, monkeypatch):
    """What a process needs beside the weights, 60 MB of libraries, has nothing to do with their size."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = load_config(ROOT / "configs/image/sd/sd15_tiny.yaml", ["model.text_encoder.width=1024"])
    model = build_model(config, without_weights=True)
    tensors = {name: torch.full(t.shape, 0.01, dtype=t.dtype) for name, t in model.state_dict().items()}
    path, plain = tmp_path / "model.safetensors", OmegaConf.to_container(config)
    save_model(path, tensors, config=plain, image_shape=model.image_shape, step=0)
    size = path.stat().st_size
    assert size > 3e8
    assert 0.95 * size < load("sd_loading").in_a_process("ours", path, 1, "float32")["peak"] < size + 1e8


def test_a_peer_s_lora_has_as_many_parameters():
    script = load("peers")
    layers = ["conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    for parameters in (100, 1000, 4321):
        unet = script.peer_unet(script.SIZES["tiny"])
        rank, larger = script.ranks_for(unet, layers, parameters)
        script.add_peft_lora(unet, rank, layers, larger)
        trained = script.count(unet, trainable=True)
        of_rank_1 = 25 + 160 + 32
        assert trained == of_rank_1 if parameters < of_rank_1 else 0 <= parameters - trained < 160
        scaling = {layer.scaling["default"] for layer in unet.modules() if hasattr(layer, "lora_A")}
        assert scaling == {1}


def test_an_mnist_that_is_not_there_is_said_before_anything_is_trained(work_folder, monkeypatch):
    script = load("results")
    monkeypatch.setattr(script, "call_script", None)
    with pytest.raises(ValueError, match="--data_dir nowhere"):
        script.main(["--data_dir", "nowhere", "--threads", "1"])


def test_results_are_made_once(work_folder, quick_judge, monkeypatch, capsys):
    script = load("results")
    monkeypatch.setattr("xdiffusion.data.digits.load_digits", lambda image_size: tiny_images())
    monkeypatch.setattr("xdiffusion.held_out.BOUND_IMAGES", 4)
    monkeypatch.setattr(script, "PEER_SAMPLING", [*script.PEER_SAMPLING, "sampling.steps=2"])
    tiny = [*TINY_CONFIG, f"data.image_size={SIZE}", "lora.target_modules=attention"]
    settings = [word for override in tiny for word in ("--set", override)]
    few = ["--seeds", 2, "--num_training_steps", 2, "--num_samples", 20, "--intervals", 2, "--peer_learning_rate", 1e-3]
    words = [*map(str, [*few, "--threads", 1, "--markdown", "docs/results.md"]), *settings]
    assert script.main(words) == 0
    document = (work_folder / "docs/results.md").read_text()
    rows = [json.loads(path.read_text()) for path in sorted(work_folder.rglob("row.json"))]
    assert len(rows) == 8
    base, _, peer_base, _, lora, _, peer_lora, _ = rows
    assert peer_base["parameters"] == pytest.approx(base["parameters"], rel=0.25)  # widths of 8 leave little choice
    assert 0.9 * lora["parameters"] < peer_lora["parameters"] <= lora["parameters"] and peer_lora["gap_closed"] != 0
    assert peer_base["bits_per_dim"] > 0 and lora["gap_closed"] is not None
    for row in rows:
        low, high = row["frechet_distance_interval"]
        assert f"{row['frechet_distance']:.3f} [{low:.3f}, {high:.3f}]" in document
        assert f"{row['parameters']:,}" in document
    _, base_text, lora_text = document.split("\n## ")
    assert "own loss (ours v" in lora_text and "own loss" not in base_text
    low, high = peer_lora["gap_closed_interval"]
    assert f"{peer_lora['gap_closed']:.3f} [{low:.3f}, {high:.3f}]" in lora_text
    assert document.count("| ours | 0 |") == document.count("| ours | 1 |") == 2

    (again,) = work_folder.glob("output/results/*/lora-theirs*-seed0/row.json")
    again.unlink()
    monkeypatch.setattr(script, "call_script", None)  # ours must not be trained again
    assert script.main(words) == 0
    made_again = json.loads(again.read_text())
    assert made_again["prompt_accuracy"] == peer_lora["prompt_accuracy"]
    assert made_again["gap_closed"] == peer_lora["gap_closed"]
    with pytest.raises(ValueError, match=r"row.json is of another budget; name another folder with --output_path"):
        script.main([*words, "--num_samples", "30"])
