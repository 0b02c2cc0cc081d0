"""CLIP's text transformer ([CLIP] section 2.4) on the attention block of the UNet.

    tokens -> token + position embedding -> causal pre-norm transformer -> final norm -> hidden states (B, L, D)

The hidden states are the UNet's context; the projected state of the end token is what CLIP compares with images. The
weights come from open_clip, from a Stable Diffusion file, or from our own contrastive training.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xdiffusion.layers.attention import Attention
from xdiffusion.text_encoders.tokenizer import VOCAB_SIZE, tokenize

END_TOKEN = VOCAB_SIZE - 1


class CLIPTextEncoder(nn.Module):
    """list of B prompts -> (B, L, width) hidden states.

    Args:
        width: of the hidden states.
        layers, heads: of the transformer.
        context_length: tokens per prompt, start and end included; longer prompts are cut.
        embed_dim: width of the space shared with images; None means width.
        activation: "gelu", or "quick_gelu" (x * sigmoid(1.702 x)) of OpenAI's weights.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        context_length: int = 77,
        embed_dim: int | None = None,
        activation: Literal["gelu", "quick_gelu"] = "gelu",
    ):
        super().__init__()
        self.context_length = context_length
        self.width = width
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.layers = nn.ModuleList(_EncoderLayer(width, heads, activation) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim or width, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """[CLIP]'s reference initialisation: scaled by width and depth."""
        width, depth = self.width, max(1, len(self.layers))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        for layer in self.layers:
            for linear in (layer.attn.to_q, layer.attn.to_k, layer.attn.to_v):
                nn.init.normal_(linear.weight, std=width**-0.5)
                nn.init.zeros_(linear.bias)
            nn.init.normal_(layer.attn.to_out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(layer.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)

    def encode(self, prompts: list[str]) -> Float[Tensor, "B L D"]:
        """The hidden states of B prompts, on the encoder's device."""
        return self(self.tokenize(prompts))

    def pooled(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """The projected hidden state of each end token: the text features of contrastive training."""
        end = (tokens == END_TOKEN).int().argmax(dim=1)
        return self.text_projection(self(tokens)[torch.arange(len(tokens), device=tokens.device), end])

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "B L"]:
        return tokenize(prompts, self.context_length).to(self.positional_embedding.device)


class _EncoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, activation: Literal["gelu", "quick_gelu"]):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width, activation)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _MLP(nn.Module):
    def __init__(self, width: int, activation: Literal["gelu", "quick_gelu"]):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.activation = {"gelu": F.gelu, "quick_gelu": _quick_gelu}[activation]

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.fc2(self.activation(self.fc1(x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
