"""CLIP's text transformer ([CLIP] section 2.4) on the attention block of the UNet.

    tokens -> token + position embedding -> causal pre-norm transformer -> final norm -> hidden states (B, L, D)

The hidden states are the UNet's context; the projected state of the end token is what CLIP compares with images. The
weights come from open_clip, from a Stable Diffusion file, or from our own contrastive training. New words with embeddings
of their own can be added ([TI]).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import zip_longest
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xdiffusion.layers.attention import Attention
from xdiffusion.text_encoders.prompt_weights import parse_weights, refuse_file_tags, remarks, weighted
from xdiffusion.text_encoders.tokenizer import END_TOKEN, VOCAB_SIZE, framed, token_ids

PromptSyntax = Literal["plain", "weighted"]


class CLIPTextEncoder(nn.Module):
    """list of B prompts -> (B, L, width) hidden states.

    Args:
        width: of the hidden states.
        layers, heads: of the transformer.
        context_length: tokens per prompt, start and end included; longer prompts are cut.
        embed_dim: width of the space shared with images; None means width.
        activation: "gelu", or "quick_gelu" (x * sigmoid(1.702 x)) of OpenAI's weights.
        clip_skip: which layer's output is the context, counted from the end: 1 = the last, 2 = the one before it (Stable
            Diffusion 2.x); the final norm is applied to it. May be set on a finished encoder.
        pad_with_end_token: pad prompts with the end token (Stable Diffusion 1.x) instead of 0 (open_clip, 2.x).

    Raises:
        ValueError: for sizes that no transformer has, or a clip_skip that is not in 1..layers.
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
        clip_skip: int = 1,
        pad_with_end_token: bool = False,
    ):
        super().__init__()
        sizes = {"width": (width, 1), "layers": (layers, 0), "heads": (heads, 1), "context_length": (context_length, 3)}
        for name, (value, least) in (sizes | {"embed_dim": (width if embed_dim is None else embed_dim, 1)}).items():
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.pad_token = END_TOKEN if pad_with_end_token else 0
        self.context_length = context_length
        self.width = width
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.layers = nn.ModuleList(_EncoderLayer(width, heads, activation) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim or width, bias=False)
        self.clip_skip = clip_skip
        self.learned_ids: dict[str, range] = {}  # token ids of learned words; VOCAB_SIZE + i is row i below
        self.register_parameter("learned_embedding", None)
        self._init_weights()

    @property
    def clip_skip(self) -> int:
        return self._clip_skip

    @clip_skip.setter
    def clip_skip(self, clip_skip: int) -> None:
        if not 1 <= clip_skip <= max(1, len(self.layers)):
            raise ValueError(f"clip_skip={clip_skip} must be in 1..{len(self.layers)}, the layers of the text encoder")
        self._clip_skip = clip_skip

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
        """Hidden states of the layer that clip_skip names, after the final norm."""
        return self._hidden(tokens, self.clip_skip)

    def _hidden(self, tokens: Tensor, clip_skip: int) -> Tensor:
        x = self._embedded(tokens) + self.positional_embedding[: tokens.shape[1]]
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.final_norm(x)

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.learned_embedding is None:
            return self.token_embedding(tokens)
        learned = self.learned_embedding[(tokens - VOCAB_SIZE).clamp(min=0)]
        known = self.token_embedding(tokens.clamp(max=VOCAB_SIZE - 1))
        return torch.where((tokens >= VOCAB_SIZE)[..., None], learned.to(known.dtype), known)

    def encode(self, prompts: list[str], syntax: PromptSyntax = "plain") -> Float[Tensor, "B L D"]:
        """The hidden states of B prompts, on the encoder's device.

        Args:
            prompts: of any length.
            syntax: "plain": the text as it stands, cut to the context length; L is the context length. "weighted": with
                the brackets of `prompt_weights`, and in as many chunks of context_length - 2 tokens as the longest of
                the prompts needs, each between a start and an end of its own; L is that many context lengths.

        Raises:
            ValueError: for an unknown syntax, or what `prompt_weights` refuses.
        """
        if syntax == "plain":
            return self(self.tokenize(prompts))
        if syntax != "weighted":
            raise ValueError(f"prompt_syntax={syntax!r} is unknown; allowed: plain, weighted")
        by_prompt = [self._chunked(self._weighted_ids(prompt)) for prompt in prompts]
        return torch.cat([self._encode_chunk(list(rows)) for rows in zip_longest(*by_prompt, fillvalue=[])], dim=1)

    def chunks(self, prompt: str, syntax: PromptSyntax = "plain") -> int:
        """How many context lengths `encode` gives a prompt alone.

        Raises:
            ValueError: for what `prompt_weights` refuses.
        """
        return len(self._chunked(self._weighted_ids(prompt))) if syntax == "weighted" else 1

    def count_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has that is read as it stands, without start and end; `encode` may cut it."""
        return len(self._token_ids(prompt))

    def remarks(self, prompts: Iterable[str], syntax: PromptSyntax = "plain") -> list[str]:
        """Lines to print on prompts: see `prompt_weights.remarks`."""
        return remarks(prompts) if syntax == "weighted" else []

    def _weighted_ids(self, prompt: str) -> list[tuple[int, float]]:
        refuse_file_tags(prompt, self.learned_ids)
        return [(token, weight) for text, weight in parse_weights(prompt) for token in self._token_ids(text)]

    def _chunked(self, row: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
        """A prompt's tokens in chunks that are read on their own; a learned word is not divided, if one can hold it."""
        size, chunks = self.context_length - 2, []
        while len(row) > size:
            token = row[size][0]
            word = next((ids for ids in self.learned_ids.values() if token in ids), range(token, token + 1))
            end = size - (token - word.start if len(word) <= size else 0)
            chunks.append(row[:end])
            row = row[end:]
        return [*chunks, row]

    def _encode_chunk(self, rows: list[list[tuple[int, float]]]) -> Tensor:
        tokens = self._framed([[token for token, _ in row] for row in rows])
        weights = torch.ones(tokens.shape, device=tokens.device)
        for i, row in enumerate(rows):
            weights[i, 1 : len(row) + 1] = torch.tensor([weight for _, weight in row], device=tokens.device)
        return weighted(self(tokens), weights)

    def pooled(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """The projected state of each end token in the last layer: the text features of contrastive training."""
        end = (tokens == END_TOKEN).int().argmax(dim=1)
        return self.text_projection(self._hidden(tokens, 1)[torch.arange(len(tokens), device=tokens.device), end])

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "B L"]:
        """Start, the prompt cut to fit, end, padding; learned words are ids from VOCAB_SIZE on."""
        return self._framed([self._token_ids(prompt, self.context_length) for prompt in prompts])

    def _framed(self, rows: list[list[int]]) -> Tensor:
        return framed(rows, self.context_length, self.pad_token).to(self.positional_embedding.device)

    def _token_ids(self, text: str, enough: float = math.inf) -> list[int]:
        ids = self.learned_ids
        return [t for piece in self._pieces(text) for t in ids.get(piece.lower()) or token_ids(piece, enough)]

    def _pieces(self, text: str) -> list[str]:
        """A text cut at its learned words."""
        if not self.learned_ids:
            return [text]
        names = "|".join(whole_word(name) for name in sorted(self.learned_ids, key=len, reverse=True))
        return re.split(f"({names})", text, flags=re.IGNORECASE)

    def learned_words_in(self, prompt: str, syntax: PromptSyntax = "plain") -> set[str]:
        """Which of the learned words `encode` finds in a prompt, in lower case."""
        texts = [text for text, _ in parse_weights(prompt)] if syntax == "weighted" else [prompt]
        return {piece.lower() for text in texts for piece in self._pieces(text)} & self.learned_ids.keys()

    def add_tokens(self, tokens: Mapping[str, Float[Tensor, "..."]], replacing: Collection[str] = ()) -> None:
        """Give the encoder new words with embeddings of their own ([TI]); each may then stand in any prompt.

        The embeddings are the rows of `learned_embedding`, a parameter of its own: to train them (textual inversion)
        optimise it alone, the table of the vocabulary stays as it is, and without learned words the state dict is that of
        the plain encoder. Adding words replaces the parameter, so add all of them before building an optimizer; words that
        take the place of as many of the same names and sizes are written into it.

        Args:
            tokens: (width,), or (n, width) for a word of n tokens, by name, such as "<cat>"; case does not matter.
            replacing: of `learned_ids`, words that are taken away.

        Raises:
            ValueError: if a name is empty or stands for other embeddings already, or an embedding is of another width;
                nothing is changed then.
        """
        table, before = self.token_embedding.weight, self.learned_tokens()
        known, new = {name: rows for name, rows in before.items() if name not in replacing}, {}
        for name, given in tokens.items():
            name, rows = name.strip().lower(), given.detach().reshape(-1, given.shape[-1]).to(table)
            if not name:
                raise ValueError("a learned token needs a name, such as <cat>")
            if rows.shape[1] != self.width:
                raise ValueError(
                    f"the learned token {name!r} has {rows.shape[1]} numbers, this text encoder's width is {self.width}: "
                    "it is of another model"
                )
            if name not in known and name not in new:
                new[name] = rows
            elif not torch.equal((known | new)[name], rows):
                raise ValueError(f"the learned token {name!r} stands for other embeddings already")
        if new or len(known) < len(before):
            self._set_learned(known | new)

    def _set_learned(self, words: Mapping[str, Float[Tensor, "n D"]]) -> None:
        """Make these the learned words; the parameter stays if only numbers change, since an optimizer may hold it."""
        ids, count = {}, VOCAB_SIZE
        for name, rows in words.items():
            ids[name] = range(count, count + len(rows))
            count += len(rows)
        if not words:
            self.learned_embedding = None
        elif ids == self.learned_ids:
            with torch.no_grad():
                self.learned_embedding.copy_(torch.cat([*words.values()]))
        else:
            trained = self.token_embedding.weight.requires_grad
            self.learned_embedding = nn.Parameter(torch.cat([*words.values()]), requires_grad=trained)
        self.learned_ids = ids

    def learned_tokens(self) -> dict[str, Float[Tensor, "n D"]]:
        """The embeddings of the learned words by name, as `add_tokens` takes them."""
        rows = {name: [i - VOCAB_SIZE for i in ids] for name, ids in self.learned_ids.items()}
        return {name: self.learned_embedding.detach()[index].clone() for name, index in rows.items()}


def whole_word(name: str) -> str:
    """A pattern for a name that does not find it inside a longer word; <name> stands out by itself."""
    before, after = (r"(?<!\w)" * bool(re.match(r"\w", name)), r"(?!\w)" * bool(re.search(r"\w$", name)))
    return before + re.escape(name) + after


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
