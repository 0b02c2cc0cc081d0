"""Scores on captioned pictures without classes: by the command on a tiny Stable Diffusion, and in cases known by hand."""

import contextlib
import json
import math
import tarfile

import pytest
import torch
from commands import EVALUATE, run_script
from omegaconf import OmegaConf
from picture_folders import truncate, write_discs, write_pictures
from tiny_sd import tiny_sd_config, tiny_sd_model

from xdiffusion import captioned_scoring, report
from xdiffusion.build import build_data, build_sampling, image_shape
from xdiffusion.captioned_scoring import SIDE, Cut, reduced, score_captioned, trained_on
from xdiffusion.checkpoints.native import save_model
from xdiffusion.lora import apply_lora_to_model, save_lora_weights
from xdiffusion.scoring import Depth
from xdiffusion.training.run_record import data_fingerprint

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 50, 230)}
WITHOUT_CLASSES = {"prompt_accuracy", "judge_accuracy", "background", "gap_closed", "bits_per_dim"}
BY_FEATURES = {"clip_score", "frechet_distance", "precision", "recall", "density", "coverage"}


class ColourTowers:
    """A CLIP that sees mean colours and reads their names."""

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 1, dim=1)

    def text_features(self, prompts):
        colours = [next(rgb for name, rgb in COLOURS.items() if name in prompt) for prompt in prompts]
        return torch.nn.functional.normalize(torch.tensor(colours).float(), dim=1)


def record_run(folder, config):
    """The run.json of a finished run on the pictures of a config."""
    with contextlib.redirect_stdout(None):
        data = {"name": "image/folder", "fingerprint": data_fingerprint(build_data(config))}
    (folder / "run.json").write_text(json.dumps({"config": {}, "segments": [{"status": "finished"}], "data": data}))


@pytest.fixture
def config(work_folder):
    """Of a tiny model, in the current folder as sd.safetensors, and of the twelve discs that it was trained on."""
    write_discs(work_folder / "set", 12, 24, COLOURS)
    config = tiny_sd_config(work_folder, lora=False)
    tensors, plain = tiny_sd_model(config).state_dict(), OmegaConf.to_container(config)
    save_model(work_folder / "sd.safetensors", tensors, config=plain, image_shape=image_shape(config), step=2)
    record_run(work_folder, config)
    return config


def evaluated(capsys, *words):
    words = ["--checkpoint", "sd.safetensors", "--num_samples", 8, "--force_cpu", "--json", *words]
    assert run_script(EVALUATE, *words) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_on_the_pictures_of_training(config, work_folder, capsys):
    scores = evaluated(capsys, "--data_dir", work_folder / "set", "--full")
    assert {key for key, value in scores.items() if value is None} == {
        *WITHOUT_CLASSES, *BY_FEATURES, "frechet_floor", "data_copying", "nearest_distance_real",
    }  # fmt: skip
    assert (scores["pictures"], scores["pictures_trained_on"], scores["num_samples"]) == (12, 12, 8)
    assert scores["diversity"] > 0 and 0 < scores["nearest_distance"] < 1 and 0 <= scores["copies"] <= 1
    curve = scores["loss_curve"]
    assert curve.keys() == {"model"} and len(curve["model"]["loss"]) == 16
    assert curve["model"]["logsnr"][-1] > -5.4  # where this schedule ends
    again = evaluated(capsys, "--data_dir", "set", "--training_data_dir", "set", "--batch_size", 3)
    assert again["diversity"] == pytest.approx(scores["diversity"], abs=1e-3)


def test_a_lora_and_pictures_that_are_held_out(config, work_folder, capsys):
    write_discs(work_folder / "new", 9, 26, COLOURS)
    (work_folder / "\U0001f98a").symlink_to("new")
    model = tiny_sd_model(config)
    apply_lora_to_model(model.network, 2, 2.0, 0.0, "attention")
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    on_new = OmegaConf.to_container(config) | {"data": dict(config.data) | {"data_dir": "new"}}
    (work_folder / "lora").mkdir()
    save_lora_weights(model.network, work_folder / "lora/1.safetensors", config=on_new)
    record_run(work_folder / "lora", OmegaConf.create(on_new))
    own = evaluated(capsys, "--lora_path", "lora/1.safetensors:0.9", "--data_dir", "new", "--full")
    assert (own["pictures"], own["pictures_trained_on"]) == (9, 9)  # the LoRA's, not the base's
    assert own["loss_curve"].keys() == {"model", "base"}
    assert own["loss_curve"]["model"] != own["loss_curve"]["base"]

    words = ["--lora_path", "lora/1.safetensors", "--data_dir", "set", "--training_data_dir", "\U0001f98a"]
    held_out = evaluated(capsys, *words, "--intervals", 20)
    assert (held_out["pictures"], held_out["pictures_trained_on"]) == (12, 0)
    assert held_out["loss_curve"] is None
    low, high = held_out["data_copying_interval"]
    assert low <= held_out["data_copying"] <= high
    assert held_out["nearest_distance_real"] < held_out["nearest_distance"]  # discs are nearer to discs than noise is


def test_a_folder_is_known_again_by_its_pictures_not_by_its_name(config, work_folder, capsys):
    (work_folder / "set/disc_3.txt").write_text("another caption")
    assert evaluated(capsys, "--data_dir", "set")["pictures_trained_on"] is None
    (work_folder / "run.json").unlink()
    assert evaluated(capsys, "--data_dir", "set")["pictures_trained_on"] is None


def test_pictures_that_are_all_one_have_no_diversity(scored, work_folder):
    write_pictures(work_folder / "new", [(16, 16)], ["red"])
    content = (work_folder / "new/picture_0.png").read_bytes()
    for i in range(1, 30):
        (work_folder / f"new/picture_{i}.png").write_bytes(content)
        (work_folder / f"new/picture_{i}.txt").write_text(f"red {i}")
    assert scored(work_folder / "new").scores["diversity"] is None


def test_a_report_that_cannot_be_written_costs_no_scores(config, work_folder, capsys, monkeypatch):
    words = ["--checkpoint", "sd.safetensors", "--num_samples", 2, "--force_cpu", "--data_dir", "set", "--json"]
    assert run_script(EVALUATE, *words, "--report", "set") == 2
    assert "--report set is a folder" in capsys.readouterr().err
    assert run_script(EVALUATE, *words, "--images_path", "images") == 2
    assert "--images_path images: of captions sample.py writes single pictures" in capsys.readouterr().err

    def full_disk(*_):
        raise ValueError("no space left")

    monkeypatch.setattr(report, "write_report", full_disk)
    assert run_script(EVALUATE, *words, "--report", "out.html") == 2
    assert json.loads(capsys.readouterr().out)["pictures"] == 12


def test_what_is_missing_is_said_and_shown(config, work_folder, capsys):
    words = [
        "--checkpoint",
        "sd.safetensors",
        "--num_samples",
        7,
        "--force_cpu",
        "--data_dir",
        "set",
        "--training_data_dir",
        "set",
        "--report",
        "out.html",
        "--intervals",
        20,
    ]
    assert run_script(EVALUATE, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    for text in (
        (page := (work_folder / "out.html").read_text()),
        *(line for line in lines if line.startswith("Compared")),
    ):
        assert "The model was trained on them: none is held out" in text
    assert any(line.startswith("prompt_accuracy") and "the pictures have no classes" in line for line in lines)
    assert any(line.startswith("clip_score") and "--clip MODEL/TAG" in line for line in lines)
    assert "<dt>frechet floor</dt>" in page and "<dt>CLIP score</dt>" in page
    assert "Not measured" in page and "closest to the training pictures" in page and "a red disc" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_samples", 1], "--num_samples 1: a distance between samples needs at least 2"),
        (["--clip", "own"], "--clip own has no vision tower for pictures without classes; name a published CLIP"),
        (["--data_dir", "nowhere"], "--data_dir nowhere is no folder"),
        (["--dataset_name", "image/digits"], "image/digits has images (1, 16, 16), the model makes (3, 16, 16)"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, message, config, capsys):
    folder = [] if "--dataset_name" in words else ["--data_dir", "set"]
    assert run_script(EVALUATE, "--checkpoint", "sd.safetensors", "--force_cpu", *folder, *words) == 2
    assert message in capsys.readouterr().err


def test_shards_without_an_end_are_refused(config, work_folder, capsys):
    with tarfile.open("set.tar", "w") as tar:
        for path in sorted((work_folder / "set").iterdir()):
            tar.add(path, path.name)
    words = ["--checkpoint", "sd.safetensors", "--dataset_name", "image/shards", "--data_dir", "set.tar", "--force_cpu"]
    assert run_script(EVALUATE, *words) == 2
    assert "has no end to compare with: save some of its pictures and use image/folder" in capsys.readouterr().err


def test_a_folder_that_only_a_file_names_is_not_read(config, work_folder, capsys):
    """A stranger's checkpoint may name any folder, whose pictures the report would show."""
    assert run_script(EVALUATE, "--checkpoint", "sd.safetensors", "--force_cpu") == 2
    assert "image/folder needs the folder of the pictures: --data_dir FOLDER" in capsys.readouterr().err
    write_discs(work_folder / "new", 3, 24, COLOURS)
    scores = evaluated(capsys, "--data_dir", "new")
    assert scores["pictures_trained_on"] is scores["data_copying"] is None

    hub = OmegaConf.to_container(config) | {"data": {"kind": "image/hugging_face", "dataset_name": "a/b", "image_size": 16}}
    tensors = tiny_sd_model(config).state_dict()
    save_model(work_folder / "sd.safetensors", tensors, config=hub, image_shape=image_shape(config), step=2)
    assert run_script(EVALUATE, "--checkpoint", "sd.safetensors", "--force_cpu") == 2
    assert "--dataset_name image/hugging_face must be given: it is downloaded" in capsys.readouterr().err


def test_a_model_of_shards_is_compared_with_a_folder(config, work_folder, capsys):
    """Its pictures have 16 pixels, which the buckets of a folder, multiples of 64, do not."""
    shards = OmegaConf.to_container(config) | {"data": {"kind": "image/shards", "data_dir": "a.tar", "image_size": 16}}
    tensors = tiny_sd_model(config).state_dict()
    save_model(work_folder / "sd.safetensors", tensors, config=shards, image_shape=image_shape(config), step=2)
    scores = evaluated(capsys, "--dataset_name", "image/folder", "--data_dir", "set")
    assert scores["pictures"] == 12


def test_a_lora_of_another_base_is_a_flag(config, work_folder, capsys):
    model = tiny_sd_model(config)
    with torch.no_grad():
        torch._foreach_mul_(list(model.network.parameters()), 1.5)
    apply_lora_to_model(model.network, 1, 1.0, 0.0, "attention")
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_lora_weights(model.network, work_folder / "lora.safetensors", base_hash="another")
    words = ["--lora_path", "lora.safetensors", "--data_dir", "set"]
    assert run_script(EVALUATE, "--checkpoint", "sd.safetensors", "--force_cpu", *words) == 2
    assert "--allow_other_base" in capsys.readouterr().err
    assert evaluated(capsys, *words, "--allow_other_base")["pictures"] == 12


@pytest.fixture
def scored(config, monkeypatch):
    """scored(new, depth): the scores of a model that draws the pictures of its captions in the folder `new`."""

    def score(new, training=None, depth=Depth(0, False, ColourTowers()), num_samples=None):  # noqa: B008
        given = build_data(OmegaConf.merge(config, {"data": {"data_dir": str(new)}}))
        pictures = {given.captions[i][0]: i for i in range(len(given))}
        cut = Cut(given, (16, 16), 4)
        monkeypatch.setattr(
            captioned_scoring,
            "generate",
            lambda model, prompts, *_, **__: cut(torch.tensor([pictures[p] for p in prompts]))[0],
        )
        model = tiny_sd_model(config)
        sampling = build_sampling(config, model.schedule) | {"batch_size": 4}
        common = {"num_samples": num_samples or len(given), "seed": 0, "has_lora": False, "depth": depth}
        return score_captioned(model, given, training or given, sampling, **common)

    return score


def test_samples_that_are_the_pictures_have_perfect_scores_and_are_copies(scored, work_folder):
    write_pictures(work_folder / "new", [(16, 16)] * 8, [f"red {i}" for i in range(8)])
    evaluation = scored(work_folder / "new", depth=Depth(20, False, ColourTowers()))
    scores = evaluation.scores
    assert scores["clip_score"] == scores["clip_score_real"] > 50
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)
    assert scores["diversity"] == pytest.approx(1, abs=1e-4)
    assert (scores["copies"], scores["nearest_distance"]) == (1, 0)
    for suspect in evaluation.suspects:
        torch.testing.assert_close(suspect.image, suspect.near[0])
    assert {f"{key}_interval" for key in ("clip_score", "frechet_distance", "diversity", "copies")} <= scores.keys()
    assert all(math.isfinite(b) for key, bounds in scores.items() if key.endswith("_interval") for b in bounds)


def test_copies_of_training_pictures_are_told_from_new_ones(scored, config, work_folder):
    write_discs(work_folder / "few", 3, 24, COLOURS)
    write_pictures(work_folder / "other", [(16, 16)] * 9, ["green"], seed=1)
    other = build_data(OmegaConf.merge(config, {"data": {"data_dir": str(work_folder / "other")}}))
    scores = scored(work_folder / "few", other, Depth(0, False)).scores
    assert scores["pictures_trained_on"] == 0
    assert scores["data_copying"] == 0.5  # samples that are the held-out pictures are as near as these
    assert scores["nearest_distance"] == scores["nearest_distance_real"] > 0.1
    assert scored(work_folder / "few", other).scores["frechet_floor"] > 0.01  # of the training pictures


@pytest.mark.parametrize(("num_samples", "real_images"), [(7, 7), (50, 9)])
def test_the_floor_is_of_as_many_training_pictures_as_samples(num_samples, real_images, scored, config, work_folder):
    write_discs(work_folder / "few", 3, 24, COLOURS)
    write_pictures(work_folder / "other", [(16, 16)] * 9, ["green"], seed=1)
    other = build_data(OmegaConf.merge(config, {"data": {"data_dir": str(work_folder / "other")}}))
    assert scored(work_folder / "few", other, num_samples=num_samples).scores["real_images"] == real_images
    assert "real_images" not in scored(work_folder / "few").scores


def test_pictures_are_known_by_their_bytes(config, work_folder):
    given = build_data(config)
    write_discs(work_folder / "part", 4, 24, COLOURS)
    (work_folder / "part/disc_3.png").rename(work_folder / "part/renamed.png")
    (work_folder / "part/disc_3.txt").rename(work_folder / "part/renamed.txt")
    part = build_data(OmegaConf.merge(config, {"data": {"data_dir": str(work_folder / "part")}}))
    assert (trained_on(given, part), trained_on(part, given), trained_on(given, given)) == (4, 4, 12)
    assert trained_on(given, None) is None


def test_a_damaged_picture_is_replaced_with_its_caption(config, work_folder):
    paths = write_pictures(work_folder / "new", [(16, 16)] * 3, ["a", "b", "c"])
    truncate(paths[1])
    given = build_data(OmegaConf.merge(config, {"data": {"data_dir": str(work_folder / "new")}}))
    images, captions = Cut(given, (16, 16), 4)(torch.tensor([1, 2]))
    assert captions == ["c", "c"] and torch.equal(images[0], images[1])


@pytest.mark.parametrize(("size", "smaller"), [((32, 128), (16, 64)), ((200, 100), (64, 32)), ((9, 12), (9, 12))])
def test_reduced_by_the_longer_side(size, smaller):
    assert reduced(torch.zeros(2, 3, *size), SIDE).shape[2:] == smaller
