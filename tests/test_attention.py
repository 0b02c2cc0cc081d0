import math

import pytest
import torch
from torch import nn

from xdiffusion.layers.attention import Attention
from xdiffusion.layers.computed_once import computed_once


def by_hand(attention, x, context):
    """Softmax attention written out per head."""
    source = x if context is None else context
    q, k, v = attention.to_q(x), attention.to_k(source), attention.to_v(source)
    head_dim = q.shape[-1] // attention.num_heads
    norm_q, norm_k = attention.norm_q or nn.Identity(), attention.norm_k or nn.Identity()
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * head_dim, (h + 1) * head_dim)
        scores = norm_q(q[..., part]) @ norm_k(k[..., part]).transpose(1, 2) / math.sqrt(head_dim)
        if attention.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return attention.to_out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("context_dim", "causal"), [(None, False), (None, True), (6, False)])
def test_attention_is_the_formula(context_dim, causal, qk_norm, generator):
    attention = Attention(8, context_dim=context_dim, num_heads=2, qkv_bias=True, qk_norm=qk_norm, causal=causal)
    x = torch.randn(3, 5, 8, generator=generator)
    context = None if context_dim is None else torch.randn(3, 4, context_dim, generator=generator)
    torch.testing.assert_close(attention(x, context), by_hand(attention, x, context), rtol=1e-5, atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=3 does not divide the attention width 8"):
        Attention(8, num_heads=3)


@torch.no_grad()
def test_a_context_is_projected_once_within_the_cache_and_each_context_on_its_own(generator):
    attention = Attention(8, context_dim=6, num_heads=2)
    x = torch.randn(1, 5, 8, generator=generator)
    first, second = torch.randn(2, 1, 4, 6, generator=generator)
    expected = [attention(x, c) for c in (first, first, second, first)]
    calls = []
    attention.to_k.register_forward_hook(lambda *a: calls.append(1))
    with computed_once(attention):
        actual = [attention(x, c) for c in (first, first, second, first)]
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    attention(x, first)
    assert len(calls) == 4  # the cache ends with its block
