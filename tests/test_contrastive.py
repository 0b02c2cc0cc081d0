"""Our own CLIP: its batches, what it learns, and how a text encoder comes by its weights."""

import re
import signal
import urllib.request
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from commands import TRAIN, TRAIN_CLIP, run_script, set_words
from huggingface_hub import constants
from open_clip.model import CLIPTextCfg, _build_text_tower
from PIL import Image
from test_resume import CONFIG
from tiny import copies, equal_bits, label_of, tiny_config, tiny_images

from xdiffusion.build import build_fresh_text_encoder, build_text_encoder, clip_config
from xdiffusion.checkpoints.errors import CheckpointError
from xdiffusion.checkpoints.reading import load_safetensors
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training import text_encoder as module
from xdiffusion.training.contrastive import ContrastiveModel, ContrastiveTask, zero_shot_accuracy
from xdiffusion.training.loop import Trainer
from xdiffusion.training.previews import draw_similarities
from xdiffusion.training.records import read_metrics
from xdiffusion.training.run_record import read_run
from xdiffusion.training.settings import OptimizerSettings, TrainingSettings
from xdiffusion.training.task import Place
from xdiffusion.training.text_encoder import initialise_text_encoder, tiny_clip_path, train_tiny_clip


def contrastive_model():
    torch.manual_seed(0)
    text = CLIPTextEncoder(width=32, layers=1, heads=2, context_length=8)
    return ContrastiveModel(text, image_size=12, channels=1)


def clip_trainer(steps=3, groups=2, seed=0, learning_rate=1e-3, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    training = TrainingSettings(num_training_steps=steps, batch_size=10 * groups, ema_decay=0.0, seed=seed, **settings)
    optimizer = OptimizerSettings(learning_rate=learning_rate, warmup_steps=0)
    return Trainer(ContrastiveTask(contrastive_model(), tiny_images(), training, optimizer), force_cpu=True)


def take_steps(trainer):
    return [trainer.step(step).loss for step in range(1, trainer.settings.num_training_steps + 1)]


def test_a_group_has_one_image_of_each_class_and_a_caption_of_it():
    trainer, data = clip_trainer(), tiny_images()
    for step in (1, 2):
        index = trainer.task.indices(Place(step))
        assert data.train.labels[index].view(2, 10).tolist() == [list(range(10))] * 2
        pairs = trainer.task.batch(Place(step))
        assert torch.equal(pairs.images, data.train.floats(index))
        allowed = [trainer.model.text.tokenize(list(captions)).tolist() for captions in data.prompts.captions]
        assert all(row in allowed[i % 10] for i, row in enumerate(pairs.tokens.tolist()))
    assert not torch.equal(trainer.task.indices(Place(1)), trainer.task.indices(Place(2)))
    assert not torch.equal(trainer.task.indices(Place(1)), trainer.task.indices(Place(1, rollbacks=1)))


def test_the_loss_is_the_cross_entropy_within_each_group():
    """The first step's loss, with both directions of the contrast written out."""
    trainer, model = clip_trainer(), contrastive_model()
    pairs, expected = trainer.task.batch(Place(1)), 0.0
    for group in (slice(0, 10), slice(10, 20)):
        images = model.image_features(pairs.images[group])
        texts = F.normalize(model.text.pooled(pairs.tokens[group]), dim=-1)
        torch.testing.assert_close(images.norm(dim=1), torch.ones(10))
        logits = images @ texts.T / 0.07
        expected += (F.cross_entropy(logits, torch.arange(10)) + F.cross_entropy(logits.T, torch.arange(10))).item() / 4
    assert trainer.step(1).loss == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_the_mean_of_its_parts():
    task = clip_trainer(groups=4).task
    whole = task.part_loss(task.batch(Place(1)), Place(1))
    places = [Place(1, part, 4) for part in range(4)]
    parts = [task.part_loss(task.batch(place), place) for place in places]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_a_group_is_never_cut():
    with pytest.raises(ValueError, match=r"batch_size=25 of the tiny CLIP must be a multiple of 10: .*image/digits"):
        ContrastiveTask(contrastive_model(), tiny_images(), TrainingSettings(batch_size=25), OptimizerSettings())
    with pytest.raises(ValueError, match="4 must divide its 2 groups, each with one of every class"):
        clip_trainer(groups=2, gradient_accumulation_steps=4)


def test_training_learns():
    trainer = clip_trainer(steps=80, learning_rate=5e-3)
    losses = take_steps(trainer)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert zero_shot_accuracy(trainer.model, tiny_images()) > 0.9


def test_training_repeats_and_leaves_the_token_table():
    table = contrastive_model().text.token_embedding.weight.clone()
    ends = []
    for seed in (0, 0, 1):
        trainer = clip_trainer(groups=1, seed=seed)
        take_steps(trainer)
        ends.append(copies(trainer.model.state_dict()))
        assert torch.equal(trainer.model.text.token_embedding.weight, table)
    assert equal_bits(ends[0], ends[1])
    assert not equal_bits(ends[0], ends[2])


def test_the_picture_shows_each_class_beside_its_captions(tmp_path):
    trainer = clip_trainer(steps=1)
    page = draw_similarities(trainer.model, tiny_images(), tmp_path / "page.png", "step 1")
    with Image.open(tmp_path / "page.png") as written:
        assert np.array_equal(np.asarray(written.convert("RGB")), np.asarray(page))
    assert min(page.size) > 400
    assert len(np.unique(np.asarray(page).reshape(-1, 3), axis=0)) > 50


# the command


TINY = [
    "data.image_size=8",
    "model.text_encoder.width=8",
    "model.text_encoder.layers=1",
    "clip.optimizer.warmup_steps=2",
]
COMMON = ["--config_path", CONFIG, "--force_cpu", "--batch_size", 20, "--num_training_steps", 5]
COMMON += ["--save_and_sample_every_n", 2, *set_words(TINY)]


def same_file(a, b):
    """Whether two safetensors files hold the same; the entries of a header have no order."""
    (tensors, header), (others, other_header) = load_safetensors(a), load_safetensors(b)
    return equal_bits(tensors, others) and header == other_header


@pytest.mark.parametrize("words", [[], ["--mixed_precision", "bf16"]], ids=["float32", "bf16"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(words, tmp_path, evidence, signals, capfd):
    assert run_script(TRAIN_CLIP, *COMMON, *words, "--output_path", tmp_path / "whole.safetensors") == 0
    signals[3] = signal.SIGTERM
    assert run_script(TRAIN_CLIP, *COMMON, *words, "--output_path", tmp_path / "cut.safetensors") == 143
    assert "to go on: python training/clip/train.py" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "cut.safetensors").is_file()
    assert (tmp_path / "cut/clip-3.safetensors").is_file()
    resume = ["--output_path", tmp_path / "cut.safetensors", "--resume_from", "auto"]
    assert run_script(TRAIN_CLIP, *COMMON, *words, *resume) == 0
    whole, cut = (evidence(tmp_path / name) for name in ("whole", "cut"))
    assert {name: cut[name] for name in whole} == whole
    assert cut.keys() - whole.keys() == {"clip-3.safetensors", "clip-3.state.pt"}
    assert same_file(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")
    assert [s["status"] for s in read_run(tmp_path / "cut")["segments"]] == ["interrupted", "finished"]
    assert [m["step"] for m in read_metrics(tmp_path / "cut/metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_training_a_model_goes_on_with_the_tiny_clip_it_was_stopped_in(work_folder, signals, capfd):
    """And the file is the one that the CLIP's own command writes."""
    sizes = set_words([*TINY, "model.network.patch_size=1", "model.network.channels=[8,8]", "model.network.head_dim=8"])
    clip = [f"clip.training.{key}" for key in ("num_training_steps=3", "batch_size=10", "save_and_sample_every_n=1")]
    words = ["--config_path", CONFIG, "--force_cpu", *sizes, *set_words(clip)]
    model = ["--num_training_steps", 1, "--batch_size", 2, "--set", "sampling.steps=1"]
    signals[2] = signal.SIGINT
    assert run_script(TRAIN, *words, *model) == 130
    assert re.search(r"to go on: python \S*training/image/train\.py ", capfd.readouterr().err.splitlines()[-1])
    assert run_script(TRAIN, *words, *model, "--resume_from", "auto") == 0
    (tower,) = work_folder.glob("output/image/digits/clip/*.safetensors")
    assert [s["first_step"] for s in read_run(tower.with_suffix(""))["segments"]] == [1, 3]
    assert run_script(TRAIN_CLIP, *words, "--output_path", work_folder / "own.safetensors") == 0
    assert same_file(tower, work_folder / "own.safetensors")


def test_zero_shot_accuracy_of_known_features():
    """Towers that see the class, and towers that see the one before it for every second image."""
    data = tiny_images(test=20)
    classes = torch.eye(10)

    def model(shift):
        labels = iter(((data.test.labels - torch.arange(20) // 10 * shift) % 10).split(512))
        return SimpleNamespace(
            text_features=lambda prompts: torch.stack([classes[label_of(data.prompts, p)] for p in prompts]),
            image_features=lambda images: classes[next(labels)],
        )

    assert zero_shot_accuracy(model(shift=0), data) == 1.0
    assert zero_shot_accuracy(model(shift=1), data) == 0.5


@pytest.mark.parametrize(("image_size", "tokens"), [(24, 16), (8, 16), (26, 4), (23, 1)])
def test_images_of_any_size_are_cut_into_at_most_16_patches(image_size, tokens):
    text = CLIPTextEncoder(width=8, layers=1, heads=2, context_length=4)
    model = ContrastiveModel(text, image_size=image_size, channels=1)
    assert model.visual.positional_embedding.shape[0] == tokens + 1
    assert model.image_features(torch.zeros(2, 1, image_size, image_size)).shape == (2, 8)


def test_three_channels_and_one():
    text = CLIPTextEncoder(width=8, layers=1, heads=2, context_length=4)
    model = ContrastiveModel(text, image_size=12, channels=1).eval()
    grey = torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(model.image_features(grey), model.image_features(grey.repeat(1, 3, 1, 1)))


# where a text encoder's weights come from


def encoder_and_config(*overrides):
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    return build_text_encoder(config), config


def initialise(encoder, config, tiny=None):
    said = []
    initialise_text_encoder(encoder, config, tiny, said.append)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    return said


def trained_tower(path, *overrides):
    """The file of a text tower after two steps."""
    steps = [f"clip.training.{key}" for key in ("num_training_steps=2", "batch_size=10", "ema_decay=0")]
    config = clip_config(tiny_config(*steps, *overrides))
    encoder = build_fresh_text_encoder(config)
    command = {"script": TRAIN_CLIP, "words": [], "resume_from": None, "force_cpu": True}
    assert train_tiny_clip(encoder, config, tiny_images(), path, **command) == 0
    return encoder


def test_null_keeps_random_weights():
    encoder, config = encoder_and_config("model.text_encoder.pretrained=null")
    before = copies(encoder.state_dict())
    assert initialise(encoder, config) == ["text encoder: random frozen weights"]
    assert equal_bits(encoder.state_dict(), before)


@pytest.mark.parametrize(
    "override",
    ["data.image_size=16", "data.kind=image/mnist", "model.text_encoder.width=16", "model.text_encoder.layers=2",
     "model.text_encoder.heads=4", "model.text_encoder.context_length=9", "training.seed=1",
     "model.text_encoder.activation=quick_gelu", "model.text_encoder.pad_with_end_token=true",
     "model.text_encoder.embed_dim=32", "clip.training.num_training_steps=3", "clip.optimizer.learning_rate=2e-3"],
)  # fmt: skip
def test_tiny_has_a_file_for_all_that_its_weights_depend_on(override, tmp_path):
    """A trial with few steps is not what later runs find."""
    data = tiny_images()
    paths = [tiny_clip_path(clip_config(tiny_config(*words)), data, tmp_path) for words in ((), (override,))]
    assert paths[0] != paths[1]
    assert paths[0] != tiny_clip_path(clip_config(tiny_config()), tiny_images(train=50), tmp_path)
    assert paths[0].is_relative_to(tmp_path / "image" / "digits")


def test_what_does_not_change_the_tower_does_not_change_its_file(tmp_path):
    kept = ("training.save_and_sample_every_n=1", "checkpoints.keep_last=1", "training.caption_dropout=0.5")
    paths = {tiny_clip_path(clip_config(tiny_config(*w)), tiny_images(), tmp_path) for w in ((), kept)}
    assert len(paths) == 1


def test_the_file_says_how_good_it_is(tmp_path):
    encoder = trained_tower(tmp_path / "clip.safetensors")
    tensors, header = load_safetensors(tmp_path / "clip.safetensors")
    assert 0 <= float(header["zero_shot_accuracy"]) <= 1
    assert header["dataset"] == "image/digits"
    assert equal_bits(tensors, encoder.state_dict())


@pytest.mark.parametrize("named", [True, False], ids=["by name", "tiny"])
def test_a_trained_tower_is_read(named, tmp_path):
    path = tmp_path / "clip.safetensors"
    trained = trained_tower(path)
    encoder, config = encoder_and_config(f"model.text_encoder.pretrained={path if named else 'tiny'}")
    with torch.no_grad():
        encoder.final_norm.bias.fill_(5.0)
    assert initialise(encoder, config, path) == [f"text encoder: {path}"]
    assert equal_bits(encoder.state_dict(), trained.state_dict())

    wider, _ = encoder_and_config("model.text_encoder.width=16")
    with pytest.raises(CheckpointError, match=r"clip\.safetensors does not fit model\.text_encoder: .*size mismatch"):
        initialise(wider, config, path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no file at .*clip\.safetensors"):
        initialise(encoder, config, path)


def test_a_tag_needs_the_open_clip_kind():
    encoder, config = encoder_and_config("model.text_encoder.pretrained=openai")
    with pytest.raises(ValueError, match=r"pretrained='openai': for kind clip allowed are tiny, null, or a \.safetensors"):
        initialise(encoder, config)


def open_clip_config(tag):
    slot = "model.text_encoder"
    return tiny_config(f"{slot}.kind=open_clip", f"{slot}.model_name=ViT-B-32", f"{slot}.pretrained={tag}")


def test_open_clip_weights_arrive_under_our_names(monkeypatch):
    sizes = {"width": 16, "layers": 1, "heads": 2, "context_length": 8}
    theirs = _build_text_tower(12, CLIPTextCfg(**sizes))
    asked = []
    monkeypatch.setattr(
        module, "download_open_clip_weights", lambda name, tag, *_: asked.append((name, tag)) or theirs.state_dict()
    )
    encoder = CLIPTextEncoder(**sizes, embed_dim=12)
    initialise(encoder, open_clip_config("openai"))
    assert asked == [("ViT-B-32", "openai")]
    tokens = encoder.tokenize(["a handwritten 3"])
    torch.testing.assert_close(encoder.pooled(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)

    other = CLIPTextEncoder(**sizes | {"width": 32}, embed_dim=12)
    with pytest.raises(CheckpointError, match=r"ViT-B-32/openai does not fit model\.text_encoder"):
        initialise(other, open_clip_config("openai"))


def test_unknown_open_clip_tags_are_named():
    encoder, _ = encoder_and_config()
    with pytest.raises(ValueError, match="pretrained: 'opanai' is unknown; open_clip has for ViT-B-32: openai, "):
        initialise(encoder, open_clip_config("opanai"))


def test_without_a_network_the_hub_is_told_so_and_the_error_says_what_to_do(monkeypatch):
    encoder, _ = encoder_and_config()

    def no_route(request, timeout):
        assert timeout <= 10
        raise OSError("no route to host")

    def no_download(*arguments, **keywords):
        assert constants.HF_HUB_OFFLINE  # so that it does not try again and again
        raise OSError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", no_route)
    monkeypatch.setattr(open_clip, "create_model", no_download)
    with pytest.raises(ValueError, match=r"'openai' of ViT-B-32 cannot be downloaded \(not in the cache.*pretrained=null"):
        initialise(encoder, open_clip_config("openai"))
    assert constants.HF_HUB_OFFLINE is False
