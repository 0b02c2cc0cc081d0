"""The ablation command: what it runs, what it leaves out the second time, and what it writes."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from commands import ABLATE, ROOT, files_in, run_script, set_words
from omegaconf import OmegaConf

from xdiffusion import scoring
from xdiffusion.checkpoints.lora_formats import read_lora
from xdiffusion.evaluation.judge import train_judge

REPORT = ("table.md", "ablation.png", "spectra.md", "singular_values.png", "subspaces.png")


@pytest.mark.slow
def test_every_combination_is_run_once_and_later_commands_add(tiny_run, work_folder, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", lambda *arguments: train_judge(*arguments, steps=5))
    folder = work_folder / "output/ablation"
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 10, "--ranks", 1, 2, *set_words(tiny_run.overrides)]

    def train_runs(*more: object) -> int:
        assert run_script(ABLATE, *words, "--targets", "config", *more) == 0
        return capsys.readouterr().out.count("$ python training/image/train.py")

    assert train_runs() == 2
    assert train_runs() == 0
    assert train_runs("--ranks", 2, "--seed", 0, 1) == 1
    assert train_runs("--ranks", 2, "--variants", "lora", "dora") == 1
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = [(r["target"], r["variant"], r["rank"], r["seed"]) for r in results]
    assert found == [
        ("config", "lora", 1, 0),
        ("config", "lora", 2, 0),
        ("config", "lora", 2, 1),
        ("config", "dora", 2, 0),
    ]
    for result in results:
        assert all(math.isfinite(result[score]) for score in ("gap_closed", "prompt_accuracy", "seconds"))
        assert result["bytes"] == (work_folder / result["file"]).stat().st_size
        modules = read_lora(work_folder / result["file"]).modules.values()
        assert {factors.rank for factors in modules} == {result["rank"]}
        assert all((factors.magnitude is not None) == (result["variant"] == "dora") for factors in modules)
    assert {f"output/ablation/{name}" for name in REPORT} <= files_in(work_folder)
    assert [(folder / name).read_text().count("\n") for name in REPORT if name.endswith(".md")] == [2 + 4, 2 + 3]
    assert run_script(ABLATE, *words, "--dataset_name", "image/digits") == 2
    assert "--dataset_name image/digits: the gap is measured on an inverted set" in capsys.readouterr().err
    config = work_folder / "other.yaml"
    config.write_text(
        f"base: {ROOT}/configs/image/digits/ddpm_24x24_v_continuous_clip.yaml\nlora: {{optimizer: {{weight_decay: 0.5}}}}\n"
    )
    assert run_script(ABLATE, *words, "--config_path", config) == 2
    assert "another base, config or budget" in capsys.readouterr().err
    assert run_script(ABLATE, *words, "--num_training_steps", 1) == 2
    assert "another base, config or budget" in capsys.readouterr().err


def test_what_a_combination_changes_in_the_config():
    settings = runpy.run_path(str(ROOT / ABLATE))["settings"]
    config = OmegaConf.create({"optimizer": {"learning_rate": 1e-2}})

    def of(variant: str, target: str = "config") -> list[str]:
        return settings({"rank": 2, "target": target, "variant": variant}, config)

    assert of("lora") == ["lora.rank=2"]
    assert of("lora", "attention+mlp") == ["lora.rank=2", 'lora.target_modules="attention+mlp"']
    assert of("rslora")[1:] == ["lora.use_rslora=true"]
    assert of("dora")[1:] == ["lora.use_dora=true"]
    assert of("lora+")[1:] == ["optimizer.lora_plus_ratio=4", "optimizer.learning_rate=0.005"]


def test_random_matrices_of_one_shape_differ_and_have_the_mean_of_random_subspaces():
    names = runpy.run_path(str(ROOT / ABLATE))
    layers = [torch.eye(4, 16)] * 400
    drawn = names["random_like"](layers)
    assert [A.shape for A in drawn] == [A.shape for A in layers]
    assert len({tuple(A.flatten().tolist()) for A in drawn}) == len(layers)
    i = torch.arange(1, 5)
    expected = torch.maximum(i[:, None], i).double() / 16
    assert torch.allclose(names["mean_similarity"](drawn, layers), expected, atol=0.015)


def test_mean_similarity_leaves_out_layers_that_are_too_narrow(generator):
    mean_similarity = runpy.run_path(str(ROOT / ABLATE))["mean_similarity"]
    wide, narrow = torch.eye(3, 8), torch.randn(3, 2, generator=generator)
    assert torch.allclose(mean_similarity([wide, narrow], [wide, narrow]), mean_similarity([wide], [wide]))
    assert torch.allclose(mean_similarity([wide], [wide]).diagonal(), torch.ones(3).double())


def test_said_before_the_first_run_is_paid_for(tiny_run, work_folder, capsys):
    words = ["--checkpoint", tiny_run.checkpoint, *set_words(tiny_run.overrides)]
    for more, message in (
        (["--targets", "config", "attenton"], "no layer of UNet matches the LoRA targets 'attenton'"),
        (["--set", "lora.init=orthogonal", "--ranks", 2, 1, "--targets", "config"], "init='orthogonal'"),
        (["--set", "training.seed=5"], "--set training.seed: it has a flag here, --seed"),
        (["--set", "lora.rank=5"], "--set lora.rank: it has a flag here, --ranks"),
        (
            ["--targets", "attention", "--set", "lora.target_modules=all"],
            "--set lora.target_modules: it has a flag here, --targets",
        ),
    ):
        assert run_script(ABLATE, *words, *more) == 2
        assert message in capsys.readouterr().err
    assert not files_in(work_folder)


def test_a_list_or_an_expression_is_no_folder_and_sampling_reaches_the_scores(tiny_run, work_folder, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "train_judge", lambda *arguments: train_judge(*arguments, steps=5))
    kept = [override for override in tiny_run.overrides if not override.startswith("lora.target_modules")]
    words = ["--checkpoint", tiny_run.checkpoint, "--num_samples", 10, "--ranks", 1, *set_words(kept)]
    blocks = [f"{block}.attentions.0.transformer_blocks.0" for block in ("down_blocks.0", "down_blocks.1", "mid_block")]
    targets = [f"[to_q, {', '.join(f'{b}.attn{i}.to_k' for b in blocks for i in (1, 2))}]", r".*\.to_[qv]"]
    more = ["--targets", *targets, *set_words(["sampling.cfg_scale=3"])]
    assert run_script(ABLATE, *words, *more) == 0
    scored = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ python sampling/image/evaluate.py")]
    assert len(scored) == 2 and all("--set sampling.cfg_scale=3" in line for line in scored)
    found = [json.loads(line) for line in (work_folder / "output/ablation/results.jsonl").read_text().splitlines()]
    assert [r["target"] for r in found] == targets
    assert [len(read_lora(Path(r["file"])).modules) for r in found] == [20, 28]
    folders = [path.name for path in (work_folder / "output/ablation").iterdir() if path.is_dir()]
    assert len(folders) == 2 and all(re.fullmatch(r"[\w-]+", name) and name[0].isalpha() for name in folders)
