"""The text encoder beside open_clip's text tower, with its weights through the table of names."""

import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower

from xdiffusion.checkpoints.open_clip import text_encoder_from_open_clip, text_encoder_to_open_clip
from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.open_clip import download_open_clip_weights, open_clip_text_encoder

SIZES = {"width": 32, "layers": 3, "heads": 4, "context_length": 12}


@pytest.fixture(params=[False, True], ids=["gelu", "quick_gelu"])
def towers(request):
    torch.manual_seed(0)
    theirs = _build_text_tower(24, CLIPTextCfg(**SIZES, output_tokens=True), quick_gelu=request.param)
    with torch.no_grad():  # away from the initial ones and zeros of norms and biases
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ours = CLIPTextEncoder(**SIZES, embed_dim=24, activation="quick_gelu" if request.param else "gelu")
    ours.load_state_dict(text_encoder_from_open_clip(theirs.state_dict()))
    return ours, theirs


def test_hidden_states_features_and_gradients_are_equal(towers):
    ours, theirs = towers
    tokens = ours.tokenize(["a handwritten 3", "", "the quick brown fox jumps over the lazy dog again and again"])
    pooled, hidden = theirs(tokens)  # open_clip returns the tokens after the final norm
    torch.testing.assert_close(ours(tokens), hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled(tokens), pooled, rtol=1e-5, atol=1e-5)

    pooled.square().sum().backward()
    ours.pooled(tokens).square().sum().backward()
    expected = text_encoder_from_open_clip({n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_the_table_is_a_bijection(towers):
    ours, theirs = towers
    back = text_encoder_to_open_clip(ours.state_dict())
    original = {n: p for n, p in theirs.state_dict().items() if n != "attn_mask"}
    assert back.keys() == original.keys()
    assert all(torch.equal(back[n], original[n]) for n in original)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14"])
def test_published_sizes_by_name(name):
    """Every name and shape of a published model's text tower, on the meta device."""
    import open_clip

    with torch.device("meta"):
        ours = open_clip_text_encoder(name)
        config = open_clip.get_model_config(name)
        theirs = _build_text_tower(config["embed_dim"], CLIPTextCfg(**config["text_cfg"]))
    shapes = {n: p.shape for n, p in text_encoder_from_open_clip(theirs.state_dict()).items()}
    assert shapes == {n: p.shape for n, p in ours.state_dict().items()}


def test_a_whole_clip_gives_its_text_tower():
    import open_clip

    clip = open_clip.CLIP(
        24, {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}, CLIPTextCfg(**SIZES)
    )
    ours = CLIPTextEncoder(**SIZES, embed_dim=24)
    ours.load_state_dict(text_encoder_from_open_clip(clip.state_dict()))
    tokens = ours.tokenize(["a handwritten 3"])
    torch.testing.assert_close(ours.pooled(tokens), clip.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="model_name='ViT-B-33' is none of open_clip's models"):
        open_clip_text_encoder("ViT-B-33")
    with pytest.raises(ValueError, match="pretrained='opanai': open_clip has for ViT-B-32: openai, "):
        download_open_clip_weights("ViT-B-32", "opanai")


def test_without_a_network_the_download_fails_at_once_and_says_what_to_do(monkeypatch):
    import time

    from xdiffusion.text_encoders import open_clip as module

    monkeypatch.setattr(module, "_reachable", lambda url: False)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"--set model.text_encoder.pretrained=null"):
        download_open_clip_weights("ViT-B-32-quickgelu", "openai")
    assert time.perf_counter() - started < 20
