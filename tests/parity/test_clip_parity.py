"""The text encoder beside open_clip's text tower and transformers' CLIPTextModel, with weights through the name tables."""

import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower
from sd_files import names_of_transformers
from transformers import CLIPTextConfig, CLIPTextModel

from xdiffusion.checkpoints.diffusers import text_encoder_to_transformers
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
    with pytest.raises(ValueError, match=r"a\.key: 'opanai' is unknown; open_clip has for ViT-B-32: openai, "):
        download_open_clip_weights("ViT-B-32", "opanai", "a.key", "")


def test_without_a_network_the_download_fails_at_once_and_says_what_to_do(monkeypatch):
    import time

    from xdiffusion import downloads

    monkeypatch.setattr(downloads, "reachable", lambda url: False)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"cannot be downloaded .* Connect to the network, or do without"):
        download_open_clip_weights("ViT-B-32-quickgelu", "openai", "a.key", "do without")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("pad_with_end_token", [False, True])
def test_transformers_hidden_states_of_every_layer(activation, pad_with_end_token):
    torch.manual_seed(0)
    ours = CLIPTextEncoder(**SIZES, activation=activation, pad_with_end_token=pad_with_end_token)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, hidden_act=activation,
            max_position_embeddings=12, eos_token_id=49407,
        )
    ).eval()  # fmt: skip
    weights = text_encoder_to_transformers(ours.state_dict())
    theirs.load_state_dict(names_of_transformers(weights))
    tokens = ours.tokenize(["a handwritten 3", "", "the quick brown fox jumps over the lazy dog again and again"])
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        torch.testing.assert_close(ours(tokens), expected.last_hidden_state, rtol=1e-5, atol=1e-5)
        pooled = ours.pooled(tokens)
        torch.testing.assert_close(pooled, expected.pooler_output @ ours.text_projection.weight.T, rtol=1e-5, atol=1e-5)
        for clip_skip in (1, 2, 3):  # as Stable Diffusion 2.x and A1111: an earlier state, with the final norm
            ours.clip_skip = clip_skip
            state = getattr(theirs, "text_model", theirs).final_layer_norm(expected.hidden_states[-clip_skip])
            torch.testing.assert_close(ours(tokens), state, rtol=1e-5, atol=1e-5)


def test_open_clips_penultimate_layer(towers):
    """What Stable Diffusion 2.x takes of OpenCLIP: the output of the last layer but one, with the final norm."""
    ours, theirs = towers
    tokens = ours.tokenize(["a handwritten 3", ""])
    states = []
    handle = theirs.transformer.resblocks[-2].register_forward_hook(lambda m, args, out: states.append(out))
    theirs(tokens)
    handle.remove()
    ours.clip_skip = 2
    torch.testing.assert_close(ours(tokens), theirs.ln_final(states[0]), rtol=1e-5, atol=1e-5)
