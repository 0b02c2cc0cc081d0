"""DreamBooth's class images: drawn where they are missing, and weighed in the loss."""

import numpy as np
import pytest
import torch
from commands import ROOT, TRAIN, run_script, set_words
from picture_folders import truncate, write_pictures
from PIL import Image
from sd_files import write_native
from tiny_sd import tiny_sd_config, tiny_sd_model, tiny_sd_trainer

from xdiffusion.build import build_sampling
from xdiffusion.checkpoints.hashes import content_hash
from xdiffusion.pictures import read_metadata
from xdiffusion.training import prior_preservation, trainable
from xdiffusion.training.prior_preservation import prepare_class_images
from xdiffusion.training.run import begin
from xdiffusion.training.run_record import read_run
from xdiffusion.training.state import RunCheckpoints
from xdiffusion.training.task import Place
from xdiffusion.training.weights_files import AdapterWeights


@pytest.fixture
def config_of(tmp_path):
    write_pictures(tmp_path / "set", [(16, 16)] * 3, ["unused"])

    def config(*overrides):
        prior = [f"prior.data_dir={tmp_path / 'class'}", "prior.num_images=6", "cache.latents=false"]
        return tiny_sd_config(tmp_path, *prior, *overrides, name="sd15_dreambooth_lora_tiny")

    return config


def prepare(config):
    model = tiny_sd_model(config)
    return drawn_by(model, config)


def drawn_by(model, config):
    return prepare_class_images(model, config, build_sampling(config, model.schedule), content_hash(model.base_weights()))


def test_missing_class_images_are_drawn_by_the_base(config_of, tmp_path, capsys):
    write_pictures(tmp_path / "class", [(16, 16)])
    images = prepare(config_of())
    assert len(images) == 6 and set(images.captions) == {("a photo of a dog",)}
    assert "class images: 5 drawn of 'a photo of a dog'" in capsys.readouterr().out
    drawn = sorted((tmp_path / "class").glob("class_*.png"))
    assert [path.name for path in drawn] == [f"class_{i:04d}.png" for i in range(5)]
    assert len({path.read_bytes() for path in drawn}) == 5
    assert read_metadata(drawn[0])["prompt"] == "a photo of a dog"


def test_a_bracket_in_their_prompt_is_no_weight(config_of):
    assert prepare(config_of("prior.prompt='a photo of a (dog'")).captions[0] == ("a photo of a (dog",)


@pytest.mark.parametrize("flag", [[], ["--no-sample_with_guidance"]])
def test_they_are_guided_as_the_config_says(flag, tmp_path, monkeypatch, capsys):
    """The flag is for the sample grids; class images stay, and later runs take them."""
    write_pictures(tmp_path / "set", [(16, 16)])
    write_native("sd15_tiny", tmp_path / "base.safetensors")

    def seen(model, config, sampling, base_hash, device):
        raise ValueError(f"drawn with {sampling}")

    monkeypatch.setattr(prior_preservation, "prepare_class_images", seen)
    words = ["--config_path", ROOT / "configs/image/sd/sd15_dreambooth_lora_tiny.yaml", "--use_lora_training"]
    words += ["--load_model_weights_from_checkpoint", tmp_path / "base.safetensors", "--data_dir", tmp_path / "set"]
    assert run_script(TRAIN, *words, "--output_path", tmp_path / "run", *flag) == 2
    assert "cfg_scale=7.5" in capsys.readouterr().err


def test_they_are_the_bases_own_whatever_the_run_trains_it_to_predict(tmp_path, monkeypatch, capsys):
    """Else a base of eps would draw them as if it predicted v, and the run would learn its noise."""
    write_pictures(tmp_path / "set", [(16, 16)])
    base, ran = write_native("sd15_tiny", tmp_path / "base.safetensors"), []

    def end(model, *_):
        ran.append((model.prediction, model.schedule.alpha_sigma(torch.ones(1))[0].item() < 1e-3))
        raise ValueError("drawn")

    monkeypatch.setattr(trainable, "describe_model", end)
    words = ["--config_path", ROOT / "configs/image/sd/sd15_dreambooth_lora_tiny.yaml", "--use_lora_training"]
    words += ["--load_model_weights_from_checkpoint", base, "--data_dir", tmp_path / "set", "--output_path", tmp_path / "run"]
    of_v = ["diffusion.prediction=v", "diffusion.schedule.zero_terminal_snr=true", "diffusion.min_snr_gamma=null"]
    for name, process in (("eps", []), ("v", of_v)):
        prior = [f"prior.data_dir={tmp_path / name}", "prior.num_images=2", "sampling.steps=2"]
        assert run_script(TRAIN, *words, *set_words([*prior, *process])) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "error: drawn"
    assert ran == [("eps", False), ("v", True)]  # which is how the run itself goes
    drawn = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("eps", "v")]
    assert len(drawn[0]) == 2 and drawn[0] == drawn[1]


def test_no_weight_wants_a_gradient_while_they_are_drawn(config_of, monkeypatch):
    """Autocast would keep a copy of it in half precision; afterwards all is as it was."""
    config, wanted = config_of("training.mixed_precision=bf16"), []

    def seen(model, *arguments, **settings):
        wanted.append(any(p.requires_grad for p in model.parameters()))
        return generate(model, *arguments, **settings)

    generate = prior_preservation.generate
    monkeypatch.setattr(prior_preservation, "generate", seen)
    model = tiny_sd_model(config)
    model.network.requires_grad_(True)
    drawn_by(model, config)
    assert wanted and not any(wanted)
    assert all(p.requires_grad for p in model.network.parameters())
    assert not any(p.requires_grad for p in model.text_encoder.parameters())


def test_class_images_that_are_there_are_left_alone(config_of, tmp_path):
    paths = write_pictures(tmp_path / "class", [(16, 16)] * 7)
    before = [path.read_bytes() for path in paths]
    assert len(prepare(config_of())) == 7
    assert [path.read_bytes() for path in paths] == before


def test_what_no_picture_is_read_of_is_no_class_image(config_of, tmp_path):
    write_pictures(tmp_path / "class", [(16, 16)])
    (tmp_path / "class/phone.heic").touch()
    assert len(prepare(config_of())) == 6


def test_a_gap_is_filled_and_nothing_is_overwritten(config_of, tmp_path):
    prepare(config_of())
    before = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    (tmp_path / "class/class_0002.png").unlink()
    assert len(prepare(config_of("prior.num_images=7"))) == 7
    after = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert set(after) == {*before, "class_0006.png"} and {name: after[name] for name in before} == before


def test_class_images_of_another_prompt_are_refused(config_of, tmp_path):
    prepare(config_of())
    truncate(tmp_path / "class/class_0000.png", 0.01)  # what cannot be read is skipped later
    with pytest.raises(ValueError, match=r"class_0001.png was drawn with prompt 'a photo of a dog', this run's is 'a cat'"):
        prepare(config_of("prior.prompt=a cat"))
    with pytest.raises(ValueError, match=r"class_0001.png was drawn with image_size '\d+', this run's is '32'"):
        prepare(config_of("data.image_size=32"))
    with pytest.raises(ValueError, match=r"class_0001.png was drawn with prediction 'eps', this run's is 'v'"):
        prepare(config_of("diffusion.prediction=v"))
    config = config_of()
    other = tiny_sd_model(config)
    other.network.conv_in.bias.data += 1
    with pytest.raises(ValueError, match=r"class_0001\.png was drawn with base "):
        drawn_by(other, config)


def test_they_are_drawn_in_the_run_s_precision_and_size(config_of, tmp_path):
    def drawn(*overrides):
        images = prepare(config_of("prior.num_images=1", *overrides))
        path = tmp_path / "class/class_0000.png"
        with Image.open(path) as picture:
            pixels = np.asarray(picture).astype(int)
        path.unlink()
        assert pixels.shape == (16, 16, 3) and len(images) == 1
        return pixels

    exact, rounded = drawn(), drawn("training.mixed_precision=bf16")
    assert 0 < np.abs(exact - rounded).mean() < 20


def test_an_image_s_noise_does_not_depend_on_how_many_were_missing(config_of, tmp_path):
    prepare(config_of())
    last = tmp_path / "class/class_0005.png"
    whole = last.read_bytes()
    last.unlink()
    prepare(config_of())
    assert last.read_bytes() == whole


def test_the_loss_is_the_weighted_mean_over_the_batch(config_of):
    config = config_of("prior.weight=0.5")
    trainer = tiny_sd_trainer(config, class_images=prepare(config))
    part = trainer.task.batches.part(1, 0, 1)
    assert part.captions == ["a photo of sks dog", "a photo of a dog"] * 2
    assert part.weights.tolist() == pytest.approx([4 / 3, 2 / 3] * 2)
    given, *of_one = (
        float(trainer.task.part_loss(part._replace(weights=torch.tensor(weights)), Place(1)).detach())
        for weights in (part.weights.tolist(), [4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 4.0])
    )
    assert given == pytest.approx(sum(w * loss / 4 for w, loss in zip([4 / 3, 2 / 3] * 2, of_one)))
    base = content_hash(trainer.model.base_weights())
    assert all(torch.isfinite(torch.tensor(trainer.step(step).loss)) for step in (1, 2))
    assert content_hash(trainer.model.base_weights()) == base


def test_a_model_that_is_trained_whole_beside_them_has_no_base(config_of, tmp_path):
    """What drew them is no frozen base of it: run.json would take the run for an adapter's."""
    config_of("training.seed=0")
    write_native("sd15_tiny", tmp_path / "base.safetensors")
    words = ["--config_path", ROOT / "configs/image/sd/sd15_dreambooth_lora_tiny.yaml", "--force_cpu"]
    words += ["--load_model_weights_from_checkpoint", tmp_path / "base.safetensors", "--data_dir", tmp_path / "set"]
    words += ["--num_training_steps", 1, "--output_path", tmp_path / "run"]
    few = [f"prior.data_dir={tmp_path / 'class'}", "prior.num_images=1", "cache.latents=false", "sampling.steps=1"]
    assert run_script(TRAIN, *words, *set_words([*few, "cache.text_embeddings=false"])) == 0
    assert read_run(tmp_path / "run")["base"] is None
    (picture,) = (tmp_path / "class").glob("*.png")
    assert len(read_metadata(picture)["base"]) == 32


def test_a_resume_with_other_class_images_is_said(config_of, tmp_path, capsys):
    config = config_of()

    def start(first_step):
        trainer = tiny_sd_trainer(config, class_images=prepare(config))
        checkpoints = RunCheckpoints(tmp_path / "run", AdapterWeights(config, "0" * 16))
        begin(trainer, checkpoints, config, ["train.py"], first_step)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("resumed under")]

    assert start(1) == start(2) == []
    (tmp_path / "class/class_0000.png").write_bytes((tmp_path / "class/class_0001.png").read_bytes())
    (line,) = start(3)
    assert line.startswith("resumed under other conditions: data.class_images=")


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_whole_batch(config_of, parts):
    class_images = prepare(config_of())

    def loss(parts):
        config = config_of(f"training.gradient_accumulation_steps={parts}", "prior.weight=0.3")
        return tiny_sd_trainer(config, class_images=class_images).step(1)

    whole, cut = loss(1), loss(parts)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5) and cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_class_images_are_cached_in_the_subject_s_shapes(config_of, tmp_path):
    write_pictures(tmp_path / "set", [(16, 16), (24, 16)], ["unused"])
    config = config_of("cache.latents=true", "data.max_aspect=2", "training.batch_size=2")
    trainer = tiny_sd_trainer(config, class_images=prepare(config))
    shapes = {tuple(trainer.task.batches.part(step, 0, 1).x0.shape[2:]) for step in range(1, 7)}
    assert shapes == {(8, 8), (6, 10)}
