"""Our own CLIP: its batches, what it learns, and how a text encoder comes by its weights."""

import urllib.request
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from open_clip.model import CLIPTextCfg, _build_text_tower
from tiny import copies, equal_bits, tiny_config, tiny_images

from xdiffusion.build import build_text_encoder
from xdiffusion.checkpoints.files import CheckpointError, load_safetensors
from xdiffusion.data.image_set import ImageSet
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.training import text_encoder as module
from xdiffusion.training.contrastive import ContrastiveModel, train_contrastive, zero_shot_accuracy
from xdiffusion.training.text_encoder import initialise_text_encoder, tiny_clip_path, train_tiny_clip


def contrastive_model():
    torch.manual_seed(0)
    text = CLIPTextEncoder(width=32, layers=1, heads=2, context_length=8)
    return ContrastiveModel(text, image_size=12, channels=1, width=32, layers=1)


def recording(data):
    """(the same data, a list that its batches are put in as they are drawn)."""
    batches = []

    class Recorded(ImageSet):
        def batch(self, index, wording):
            batches.append(super().batch(index, wording))
            return batches[-1]

    return Recorded(**vars(data)), batches


def test_a_group_has_one_image_of_each_class():
    data, batches = recording(tiny_images())
    train_contrastive(contrastive_model(), data, steps=3, groups=2)
    assert len(batches) == 3
    for batch in batches:
        assert batch.labels.view(2, 10).sort(dim=1).values.tolist() == [list(range(10))] * 2


def test_the_loss_is_the_cross_entropy_within_each_group():
    """The first step's loss, with both directions of the contrast written out."""
    data, batches = recording(tiny_images())
    losses = []
    train_contrastive(contrastive_model(), data, steps=1, groups=2, on_step=lambda step, loss: losses.append(loss))
    model = contrastive_model()
    expected = 0.0
    for group in (slice(0, 10), slice(10, 20)):
        images = model.image_features(batches[0].images[group])
        texts = model.text_features(batches[0].captions[group])
        torch.testing.assert_close(images.norm(dim=1), torch.ones(10))
        logits = images @ texts.T / 0.07
        expected += (F.cross_entropy(logits, torch.arange(10)) + F.cross_entropy(logits.T, torch.arange(10))).item() / 4
    assert losses == [pytest.approx(expected, rel=1e-4)]


def test_training_learns():
    losses = []
    model, data = contrastive_model(), tiny_images()
    train_contrastive(
        model, data, steps=60, groups=2, learning_rate=5e-3, on_step=lambda step, loss: losses.append(loss)
    )
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert zero_shot_accuracy(model, data) > 0.9


def test_training_repeats_and_leaves_the_token_table():
    first, second, other = models = [contrastive_model() for _ in range(3)]
    table = first.text.token_embedding.weight.clone()
    for model, seed in zip(models, (0, 0, 1)):
        train_contrastive(model, tiny_images(), steps=3, groups=1, seed=seed)
    assert equal_bits(first.state_dict(), second.state_dict())
    assert not equal_bits(first.state_dict(), other.state_dict())
    assert torch.equal(first.text.token_embedding.weight, table)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 11])
def test_every_length_of_training_works(steps):
    """OneCycleLR has lengths at which it divides by zero."""
    taken = []
    train_contrastive(
        contrastive_model(), tiny_images(), steps=steps, groups=1, on_step=lambda step, loss: taken.append(step)
    )
    assert taken == list(range(steps))


def test_zero_shot_accuracy_of_known_features():
    """Towers that see the class, and towers that see the one before it for every second image."""
    data = tiny_images(test=20)
    classes = torch.eye(10)

    def model(shift):
        labels = iter(((data.test.labels - torch.arange(20) // 10 * shift) % 10).split(512))
        return SimpleNamespace(
            text_features=lambda prompts: torch.stack([classes[data.prompts.label_of(p)] for p in prompts]),
            image_features=lambda images: classes[next(labels)],
        )

    assert zero_shot_accuracy(model(shift=0), data) == 1.0
    assert zero_shot_accuracy(model(shift=1), data) == 0.5


def test_a_patch_must_divide_the_image():
    text = CLIPTextEncoder(width=8, layers=1, heads=2, context_length=4)
    with pytest.raises(ValueError, match="patch_size=5 does not divide image_size=12"):
        ContrastiveModel(text, image_size=12, channels=1, patch_size=5)


def test_three_channels_and_one():
    text = CLIPTextEncoder(width=8, layers=1, heads=2, context_length=4)
    model = ContrastiveModel(text, image_size=12, channels=1, width=16, layers=1).eval()
    grey = torch.rand(2, 1, 12, 12)
    torch.testing.assert_close(model.image_features(grey), model.image_features(grey.repeat(1, 3, 1, 1)))


# where a text encoder's weights come from


def encoder_and_config(*overrides):
    config = tiny_config("clip.steps=2", "clip.groups=1", *overrides)
    torch.manual_seed(0)
    return build_text_encoder(config), config


def initialise(encoder, config, folder):
    said = []
    initialise_text_encoder(encoder, config, tiny_images(), folder, said.append)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    return said


def test_null_keeps_random_weights(tmp_path):
    encoder, config = encoder_and_config("model.text_encoder.pretrained=null")
    before = copies(encoder.state_dict())
    assert initialise(encoder, config, tmp_path) == ["text encoder: random frozen weights"]
    assert equal_bits(encoder.state_dict(), before)
    assert list(tmp_path.iterdir()) == []


def test_tiny_is_trained_once_and_read_afterwards(tmp_path, monkeypatch):
    first, config = encoder_and_config("model.text_encoder.pretrained=tiny")
    fresh = copies(first.state_dict())
    said = initialise(first, config, tmp_path)
    path = tiny_clip_path(config, tmp_path)
    assert path.is_relative_to(tmp_path / "image" / "digits")
    assert said[0] == f"text encoder: no tiny CLIP at {path} yet, training it"
    assert said[-1] == f"text encoder: {path}"
    assert not equal_bits(first.state_dict(), fresh)

    monkeypatch.setattr(module, "train_tiny_clip", None)  # a second training would fail
    second, _ = encoder_and_config("model.text_encoder.pretrained=tiny")
    with torch.no_grad():
        second.final_norm.bias.fill_(5.0)
    assert initialise(second, config, tmp_path) == [f"text encoder: {path}"]
    assert equal_bits(second.state_dict(), first.state_dict())


@pytest.mark.parametrize(
    "override",
    ["data.image_size=16", "data.kind=image/mnist", "model.text_encoder.width=16", "model.text_encoder.layers=2",
     "model.text_encoder.heads=4", "model.text_encoder.context_length=9"],
)  # fmt: skip
def test_tiny_has_a_file_per_data_and_size(override, tmp_path):
    assert tiny_clip_path(tiny_config(override), tmp_path) != tiny_clip_path(tiny_config(), tmp_path)


def test_the_file_says_how_good_it_is(tmp_path):
    encoder, config = encoder_and_config()
    accuracy = train_tiny_clip(encoder, config, tiny_images(), tmp_path / "clip.safetensors", say=lambda line: None)
    tensors, header = load_safetensors(tmp_path / "clip.safetensors")
    assert float(header["zero_shot_accuracy"]) == pytest.approx(accuracy, abs=1e-4)
    assert header["dataset"] == "image/digits"
    assert equal_bits(tensors, encoder.state_dict())


def test_a_file_by_name(tmp_path):
    path = tmp_path / "clip.safetensors"
    trained, config = encoder_and_config(f"model.text_encoder.pretrained={path}")
    train_tiny_clip(trained, config, tiny_images(), path, say=lambda line: None)
    encoder, _ = encoder_and_config()
    initialise(encoder, config, tmp_path)
    assert equal_bits(encoder.state_dict(), trained.state_dict())

    wider, _ = encoder_and_config("model.text_encoder.width=16")
    with pytest.raises(CheckpointError, match=r"clip\.safetensors does not fit model\.text_encoder: .*size mismatch"):
        initialise(wider, config, tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no file at .*clip\.safetensors"):
        initialise(encoder, config, tmp_path)


def test_a_tag_needs_the_open_clip_kind(tmp_path):
    encoder, config = encoder_and_config("model.text_encoder.pretrained=openai")
    with pytest.raises(
        ValueError, match=r"pretrained='openai': for kind clip allowed are tiny, null, or a \.safetensors"
    ):
        initialise(encoder, config, tmp_path)


def open_clip_config(tag):
    slot = "model.text_encoder"
    return tiny_config(f"{slot}.kind=open_clip", f"{slot}.model_name=ViT-B-32", f"{slot}.pretrained={tag}")


def test_open_clip_weights_arrive_under_our_names(tmp_path, monkeypatch):
    sizes = {"width": 16, "layers": 1, "heads": 2, "context_length": 8}
    theirs = _build_text_tower(12, CLIPTextCfg(**sizes))
    asked = []
    monkeypatch.setattr(
        module, "download_open_clip_weights", lambda name, tag: asked.append((name, tag)) or theirs.state_dict()
    )
    encoder = CLIPTextEncoder(**sizes, embed_dim=12)
    initialise(encoder, open_clip_config("openai"), tmp_path)
    assert asked == [("ViT-B-32", "openai")]
    tokens = encoder.tokenize(["a handwritten 3"])
    torch.testing.assert_close(encoder.pooled(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)

    other = CLIPTextEncoder(**sizes | {"width": 32}, embed_dim=12)
    with pytest.raises(CheckpointError, match=r"ViT-B-32/openai does not fit model\.text_encoder"):
        initialise(other, open_clip_config("openai"), tmp_path)


def test_unknown_open_clip_tags_are_named(tmp_path):
    encoder, _ = encoder_and_config()
    with pytest.raises(ValueError, match="pretrained='opanai': open_clip has for ViT-B-32: openai, "):
        initialise(encoder, open_clip_config("opanai"), tmp_path)


def test_without_a_network_the_hub_is_told_so_and_the_error_says_what_to_do(tmp_path, monkeypatch):
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
    with pytest.raises(
        ValueError, match=r"'openai' of ViT-B-32 cannot be downloaded \(not in the cache.*pretrained=null"
    ):
        initialise(encoder, open_clip_config("openai"), tmp_path)
    assert constants.HF_HUB_OFFLINE is False
