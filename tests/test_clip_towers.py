"""CLIP scores: the definition, our own vision tower for a frozen text tower, and published models by name."""

import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch
from commands import EVALUATE, run_script
from hostile_files import write_changed_model
from tiny import copies, equal_bits, tiny_images

from xdiffusion import clip_towers
from xdiffusion.clip_towers import PublishedTowers, own_towers
from xdiffusion.evaluation.clip_score import clip_score
from xdiffusion.text_encoders.clip import CLIPTextEncoder


def test_too_few_samples_are_refused_before_a_tower_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_towers, "train_contrastive", lambda *given: pytest.fail("trained"))
    model = write_changed_model(tmp_path / "a.safetensors")
    assert run_script(EVALUATE, "--checkpoint", model, "--clip", "own", "--num_samples", 1, "--force_cpu") == 2
    assert "--num_samples 1: neighbours and two of each class need at least 20 samples" in capsys.readouterr().err


def test_the_score_is_a_cosine_in_percent():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100, 60, 0])


def test_a_vision_tower_is_trained_for_a_frozen_text_tower_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_towers, "TRAINING", replace(clip_towers.TRAINING, num_training_steps=20))
    torch.manual_seed(0)
    encoder = CLIPTextEncoder(width=32, layers=1, heads=2, context_length=8).eval()
    before, data = copies(encoder.state_dict()), tiny_images()
    towers = own_towers(encoder, data, tmp_path)
    assert equal_bits(encoder.state_dict(), before)
    assert not any(p.requires_grad for p in towers.parameters())

    images = towers.image_features(data.test.floats())
    right, wrong = (
        towers.text_features([data.prompts.captions[(label + shift) % 10][0] for label in data.test.labels.tolist()])
        for shift in (0, 1)
    )
    assert clip_score(images, right).mean() > clip_score(images, wrong).mean() + 2

    (file,) = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr(clip_towers, "train_contrastive", None)  # a second training would fail
    assert torch.equal(own_towers(encoder, data, tmp_path).image_features(data.test.floats()), images)
    with torch.no_grad():
        encoder.positional_embedding.add_(1)
    with pytest.raises(TypeError):  # another text tower needs another vision tower
        own_towers(encoder, data, tmp_path)
    assert [file] == list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["ViT-B-33/openai", "ViT-B-32", "other"])
def test_names_of_no_published_model(name):
    with pytest.raises(ValueError, match=f"--clip '{name}' must be own, or MODEL/TAG"):
        PublishedTowers(name)


def test_a_published_model_that_cannot_be_downloaded_is_said_at_once(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be downloaded .* Connect to the network, or name another one, or leave it"):
        PublishedTowers("ViT-B-32-quickgelu/openai")
    with pytest.raises(ValueError, match="--clip: 'foo' is unknown; open_clip has for ViT-B-32: openai, "):
        PublishedTowers("ViT-B-32/foo")


@pytest.mark.parametrize("centred", [False, True])
def test_published_towers_are_open_clips(centred, monkeypatch):
    """A tiny model of open_clip's, under the name of a published one, which may have been trained on images in [-1, 1]."""
    import open_clip

    settings = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 24, "layers": 1, "width": 16, "head_width": 8, "patch_size": 12},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", settings)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    monkeypatch.setattr(clip_towers, "download_open_clip_weights", lambda *asked: model.state_dict())
    if centred:
        own = {"tiny-clip": {"ours": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}}}
        monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", own)
    towers = PublishedTowers("tiny-clip/ours")
    images = torch.rand(2, 1, 24, 24) * 2 - 1
    normalised = (images.expand(-1, 3, -1, -1) + 1) / 2
    constants = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD) if not centred else ([0.5] * 3, [0.5] * 3)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in constants)
    expected = torch.nn.functional.normalize(model.eval().encode_image((normalised - mean) / std), dim=-1)
    torch.testing.assert_close(towers.image_features(images), expected, rtol=1e-4, atol=1e-5)
    texts = torch.nn.functional.normalize(model.encode_text(open_clip.tokenize(["a", "b"])), dim=-1)
    torch.testing.assert_close(towers.text_features(["a", "b"]), texts)
