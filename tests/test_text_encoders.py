import subprocess
import sys

import pytest
import torch

from xdiffusion.text_encoders.clip import END_TOKEN, CLIPTextEncoder
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.text_encoders.tokenizer import VOCAB_SIZE, tokenize


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return CLIPTextEncoder(width=16, layers=2, heads=2, context_length=10).requires_grad_(False)


def test_tokens_are_open_clips():
    import open_clip

    prompts = ["a handwritten 3", "", "Ünïcode & <b>tags</b>", "word " * 40]
    assert torch.equal(tokenize(prompts, 77), open_clip.tokenize(prompts))
    assert tokenize(prompts, 8).shape == (4, 8)
    assert open_clip.get_tokenizer("ViT-B-32").vocab_size == VOCAB_SIZE
    assert tokenize(["x"], 8)[0, 2] == END_TOKEN


def test_the_tokenizer_does_not_import_the_rest_of_open_clip():
    code = (
        "import sys; from xdiffusion.text_encoders.tokenizer import tokenize; tokenize(['a'], 5);"
        "assert 'open_clip' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_token_does_not_see_later_ones(encoder):
    tokens = encoder.tokenize(["the digit 7"])
    changed = tokens.clone()
    changed[0, 4:] = 100
    assert torch.equal(encoder(tokens)[:, :4], encoder(changed)[:, :4])
    assert not torch.equal(encoder(tokens)[:, 4:], encoder(changed)[:, 4:])


def test_pooled_is_the_projected_state_of_the_end_token(encoder):
    prompts = ["7", "a handwritten seven"]
    tokens = encoder.tokenize(prompts)
    hidden = encoder(tokens)
    ends = [row.tolist().index(END_TOKEN) for row in tokens]
    expected = torch.stack([hidden[i, end] @ encoder.text_projection.weight.T for i, end in enumerate(ends)])
    torch.testing.assert_close(encoder.pooled(tokens), expected)


def test_the_cache_runs_the_encoder_once_per_prompt(encoder):
    calls = []
    handle = encoder.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    cache = PromptCache(encoder)
    a = cache(["0", "1", "0", "the digit 2"])
    b = cache(["the digit 2", "3", "1"])
    handle.remove()
    assert calls == [3, 1]
    torch.testing.assert_close(a, encoder.encode(["0", "1", "0", "the digit 2"]))
    torch.testing.assert_close(b, encoder.encode(["the digit 2", "3", "1"]))


def test_the_cache_starts_over_when_it_is_full(encoder, monkeypatch):
    monkeypatch.setattr("xdiffusion.text_encoders.prompt_cache.MAX_BYTES", 1)
    cache = PromptCache(encoder)
    cache(["0", "1"])
    torch.testing.assert_close(cache(["1", "2"]), encoder.encode(["1", "2"]))
    assert set(cache.rows) == {"1", "2"}
