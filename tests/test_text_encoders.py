import subprocess
import sys
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdiffusion.text_encoders.clip import END_TOKEN, CLIPTextEncoder
from xdiffusion.text_encoders.prompt_cache import PromptCache
from xdiffusion.text_encoders.tokenizer import LONGEST_WORD, VOCAB_SIZE, _tokenizer, token_ids


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return CLIPTextEncoder(width=16, layers=2, heads=2, context_length=10).requires_grad_(False)


def tokenize(prompts, context_length):
    return CLIPTextEncoder(width=2, layers=0, context_length=context_length).tokenize(prompts)


def test_tokens_are_open_clips():
    import open_clip

    prompts = ["a handwritten 3", "", "Ünïcode & <b>tags</b>", "word " * 40]
    assert torch.equal(tokenize(prompts, 77), open_clip.tokenize(prompts))
    assert tokenize(prompts, 8).shape == (4, 8)
    assert open_clip.get_tokenizer("ViT-B-32").vocab_size == VOCAB_SIZE
    assert tokenize(["x"], 8)[0, 2] == END_TOKEN


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="aábcdefghtne ", max_size=LONGEST_WORD),
    st.lists(st.sampled_from(["a", "ab ", "the", "ing", "日本", "🙂", "é", "!", "<end_of_text>", "'s"]), max_size=60).map(
        "".join
    ),
)


@given(text=TEXTS, enough=st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_tokens_of_any_text_are_open_clips(text, enough):
    """As long as no word is longer than any is."""
    expected = _tokenizer().encode(text)
    assert token_ids(text) == expected
    assert token_ids(text, enough)[:enough] == expected[:enough]


@pytest.mark.parametrize("letters", ["a", "ab", "日本", "qwertyuiop", "🙂"])
def test_a_word_without_end_is_tokenized_at_once(letters, no_hang):
    assert tokenize([letters * 300_000], 77)[0, -1] == END_TOKEN
    assert len(token_ids(letters * 3000)) > 100


def test_words_are_not_kept_for_ever():
    before = len(_tokenizer().cache)
    token_ids("some words that were not there, <start_of_text> among them")
    assert len(_tokenizer().cache) == before and token_ids("<start_of_text>") == [VOCAB_SIZE - 2]


def test_the_tokenizer_does_not_import_the_rest_of_open_clip():
    code = (
        "import sys; from xdiffusion.text_encoders.tokenizer import token_ids; token_ids('a');"
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


# --- Stable Diffusion's variants ---


def test_clip_skip_leaves_out_the_last_layers(encoder):
    tokens = encoder.tokenize(["the digit 7"])
    whole, pooled = encoder(tokens), encoder.pooled(tokens)
    states = []
    handle = encoder.layers[0].register_forward_hook(lambda m, args, out: states.append(out))
    encoder.clip_skip = 2
    earlier, pooled_again = encoder(tokens), encoder.pooled(tokens)
    encoder.clip_skip = 1
    handle.remove()
    assert torch.equal(earlier, encoder.final_norm(states[0]))
    assert not torch.equal(earlier, whole)
    assert torch.equal(pooled, pooled_again)  # what is compared with images is the last layer's
    assert torch.equal(CLIPTextEncoder(width=8, layers=3, clip_skip=3)(tokens).isfinite().all(), torch.tensor(True))
    for skip in (0, 3):
        with pytest.raises(ValueError, match=rf"clip_skip={skip} must be in 1..2"):
            encoder.clip_skip = skip


def test_padding_is_zero_or_the_end_token():
    padded = CLIPTextEncoder(width=8, layers=1, context_length=6, pad_with_end_token=True).tokenize(["7", "a b c d e f"])
    zeros = CLIPTextEncoder(width=8, layers=1, context_length=6).tokenize(["7", "a b c d e f"])
    assert (padded[0, 2:] == END_TOKEN).all()
    assert zeros[0].tolist()[2:] == [END_TOKEN, 0, 0, 0]
    assert torch.equal(padded[1], zeros[1])


# --- the weighted syntax ---


def test_without_brackets_short_prompts_are_the_same_in_both_syntaxes(encoder):
    prompts = ["the digit 7", "", "a handwritten 3"]
    assert torch.equal(encoder.encode(prompts, "weighted"), encoder.encode(prompts))
    with pytest.raises(ValueError, match="prompt_syntax='fancy' is unknown; allowed: plain, weighted"):
        unwrap(CLIPTextEncoder.encode)(encoder, prompts, "fancy")


def test_weights_reach_their_tokens(encoder):
    plain, strong = encoder.encode(["a red fox"])[0], encoder.encode(["a (red:1.5) fox"], "weighted")[0]
    ratio = strong / plain
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    relative = ratio[:, 0] / ratio[0, 0]
    assert relative.tolist() == pytest.approx([1, 1, 1.5, *[1] * 7], rel=1e-4)


def test_long_prompts_become_chunks_of_one_number_for_all(encoder):
    words = "one two three four five six seven eight nine ten"  # 8 tokens fit between start and end
    contexts = encoder.encode([words, "7"], "weighted")
    assert contexts.shape == (2, 20, 16)
    first, second = "one two three four five six seven eight", "nine ten"
    torch.testing.assert_close(contexts[0], encoder.encode([first, second]).flatten(0, 1))
    torch.testing.assert_close(contexts[1], encoder.encode(["7", ""]).flatten(0, 1))
    assert encoder.encode([words]).shape == (1, 10, 16)  # plain: cut


# --- learned words ---


@pytest.fixture
def learner():
    torch.manual_seed(0)
    return CLIPTextEncoder(width=8, layers=1, context_length=10)


def test_learned_words_stand_for_their_embeddings(learner):
    plain = {name: p.clone() for name, p in learner.state_dict().items()}
    before = learner.encode(["a cat"])
    table = learner.token_embedding.weight
    (cat,) = token_ids("cat")
    learner.add_tokens({"<cat>": table[cat], "two": torch.stack([table[cat], table[cat] + 1])})
    assert torch.equal(learner.encode(["a cat"]), before)
    assert torch.equal(learner.encode(["a <cat>"]), before)
    assert torch.equal(learner.encode(["a <cat>"], "weighted"), before)
    assert torch.equal(learner.encode(["A<CAT>"]), before)
    expected = [VOCAB_SIZE, *token_ids("twofold"), VOCAB_SIZE + 1, VOCAB_SIZE + 2, *token_ids(","), VOCAB_SIZE]
    assert learner.tokenize(["<cat> twofold Two, <cat>"])[0, 1 : len(expected) + 1].tolist() == expected
    assert learner.learned_words_in("twofold (a <CAT>:1.2)") == {"<cat>"}
    assert set(learner.state_dict()) - set(plain) == {"learned_embedding"}
    assert all(torch.equal(learner.state_dict()[name], value) for name, value in plain.items())
    learned = learner.learned_tokens()
    assert {name: tuple(rows.shape) for name, rows in learned.items()} == {"<cat>": (1, 8), "two": (2, 8)}
    other = CLIPTextEncoder(width=8, layers=1, context_length=10)
    other.load_state_dict(plain)
    other.add_tokens(learned)
    assert torch.equal(other.encode(["two <cat>s"]), learner.encode(["two <cat>s"]))


def test_only_learned_rows_get_a_gradient_where_the_rest_is_frozen(learner):
    learner.add_tokens({"<cat>": torch.randn(2, 8)})
    learner.requires_grad_(False)
    learner.learned_embedding.requires_grad_(True)
    learner.encode(["a <cat>"]).square().sum().backward()
    assert (learner.learned_embedding.grad != 0).any(dim=1).all()
    assert learner.token_embedding.weight.grad is None


def test_of_two_words_that_begin_alike_the_longer_one_is_found(learner):
    learner.add_tokens({"red": torch.ones(8), "red fox": torch.zeros(8)})
    assert [learner.learned_words_in(text) for text in ("a red fox", "a red foxglove")] == [{"red fox"}, {"red"}]


@pytest.mark.parametrize("trains", [True, False])
def test_words_are_trained_where_the_vocabulary_is(trains, learner):
    """A frozen encoder stays frozen with the words of a LoRA that is loaded."""
    learner.requires_grad_(trains)
    learner.add_tokens({"<cat>": torch.ones(8)})
    assert learner.learned_embedding.requires_grad == trains


def test_words_are_added_whole_or_not_at_all(learner):
    learner.add_tokens({"<a>": torch.ones(8)})
    learner.add_tokens({"<A>": torch.ones(1, 8), "<b>": torch.zeros(8)})  # the same again
    assert list(learner.learned_ids) == ["<a>", "<b>"]
    for tokens, message in [
        ({"<c>": torch.ones(8), "<a>": torch.zeros(8)}, "'<a>' stands for other embeddings already"),
        ({"<c>": torch.ones(8), "<d>": torch.ones(2, 16)}, "'<d>' has 16 numbers, this text encoder's width is 8"),
        ({"<c>": torch.ones(8), "<C>": torch.zeros(8)}, "'<c>' stands for other embeddings already"),
        ({" ": torch.ones(8)}, "needs a name"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.add_tokens(tokens)
    assert list(learner.learned_ids) == ["<a>", "<b>"]
    assert learner.learned_embedding.shape == (2, 8)


def test_words_that_take_the_place_of_others(learner):
    plain = learner.encode(["<a> <b> <c>"])
    learner.add_tokens({"<a>": torch.ones(8), "<b>": torch.zeros(8)})
    parameter = learner.learned_embedding
    learner.add_tokens({"<b>": torch.full((8,), 3.0)}, replacing=["<b>"])
    assert learner.learned_embedding is parameter
    learner.add_tokens({"<c>": torch.full((2, 8), 5.0)}, replacing=["<a>"])
    assert {w: rows.unique().tolist() for w, rows in learner.learned_tokens().items()} == {"<b>": [3.0], "<c>": [5.0]}
    learner.add_tokens({}, replacing=["<b>", "<c>"])
    assert learner.learned_embedding is None
    assert torch.equal(learner.encode(["<a> <b> <c>"]), plain)


# --- the cache ---


def test_the_cache_runs_the_encoder_once_per_prompt(encoder):
    calls = []
    handle = encoder.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    cache = PromptCache(encoder)
    a = cache(["0", "1", "0", "the digit 2"])
    b = cache(["the digit 2", "3", "1"])
    handle.remove()
    assert calls == [1] * 4  # each alone: its bits must not depend on the company in which it first came
    assert torch.equal(b[0], a[3]) and torch.equal(a[0], encoder.encode(["0"])[0])
    torch.testing.assert_close(a, encoder.encode(["0", "1", "0", "the digit 2"]))
    torch.testing.assert_close(b, encoder.encode(["the digit 2", "3", "1"]))


def test_the_cache_starts_over_when_it_is_full(encoder, monkeypatch):
    monkeypatch.setattr("xdiffusion.text_encoders.prompt_cache.MAX_BYTES", 1)
    cache = PromptCache(encoder)
    cache(["0", "1"])
    torch.testing.assert_close(cache(["1", "2"]), encoder.encode(["1", "2"]))
    assert set(cache.rows) == {"1", "2"}
