"""Weights in prompts: the grammar, what is refused, and what a weight does to hidden states."""

import pytest
import torch

from xdiffusion.text_encoders.clip import CLIPTextEncoder
from xdiffusion.text_encoders.prompt_weights import parse_weights, weighted


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CLIPTextEncoder(width=8, layers=1, context_length=20)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("an [unimportant] word", [("an ", 1.0), ("unimportant", 1 / 1.1), (" word", 1.0)]),
        (r"\(literal\] \\ \[x\)", [(r"(literal] \ [x)", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(fox: 1.25 )", [("fox", 1.25)]),
        ("(a: b, c:.5)", [("a: b, c", 0.5)]),
        ("12:30 and 1:2", [("12:30 and 1:2", 1.0)]),
        (r"a|b (c|d), \[e|f\], \[g:h:0.5\]", [("a|b ", 1.0), ("c|d", 1.1), (", [e|f], [g:h:0.5]", 1.0)]),
        (r"[a\|b: c]", [("a|b: c", 1 / 1.1)]),
        # the example of A1111's own documentation, with its last bracket closed
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("", []),
        ("()", []),
    ],
)  # fmt: skip
def test_the_grammar(prompt, expected):
    parsed = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in expected]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (fox", r"'\(' is never closed; write \\\( for the character"),
        ("a [fox", r"'\[' is never closed"),
        ("a fox)", r"'\)' closes nothing; write \\\)"),
        ("a (fox]", r"'\]' closes nothing"),
        ("[fox:1.2)", r"':1.2\)' closes nothing"),
        ("(fox:1.2.3)", "'1.2.3' must be a number"),
        ("a [fox:dog:0.5]", r"':0.5\]' would change words on the way, .* write \\\[ and \\\] for the characters"),
        ("a [(red:1.2) fox::10 ]", r"':10 \]' would change words on the way"),
        ("a [fox|dog]", r"'\|' between brackets would change words on the way"),
        ("(" * 33 + "fox" + ")" * 33, "more than 32 brackets are open"),
    ],
)
def test_mistakes_are_named(prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_weights(prompt)
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("tag", ["<lora:ink:0.8>", "<LORA:ink>", "<lyco:ink:1:0.5>", "<hypernet:ink:1>"])
def test_tags_that_name_a_file_are_no_words(tag, encoder):
    prompt = f"a fox {tag}"
    with pytest.raises(ValueError, match=f"{tag}.*--lora_path FILE:SCALE") as error:
        encoder.encode([prompt], "weighted")
    assert repr(prompt) in str(error.value)
    assert torch.equal(encoder.encode([prompt]), encoder.encode([prompt], "plain"))  # a caption
    encoder.encode(["<cat> a<b:c and lora:ink"], "weighted")
    encoder.add_tokens({tag: torch.ones(8)})
    assert encoder.learned_words_in(prompt) == {tag.lower()}
    encoder.encode([prompt], "weighted")


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["a fox BREAK a dog", "a BREAK"], ["BREAK"]),
        (["a fox AND a dog BREAK"], ["BREAK", "AND"]),
        (["a fox and a dog at daybreak", "HAND, BREAKFAST"], []),
    ],
)
def test_keywords_that_stay_words_are_told_once(prompts, told, encoder):
    remarks = encoder.remarks(prompts, "weighted")
    assert [remark.split()[0] for remark in remarks] == told
    assert all("taken as a word" in remark for remark in remarks)
    assert encoder.remarks(prompts, "plain") == []


@pytest.mark.parametrize(
    ("prompt", "deepest"),
    [("\\a" * 200_000, 0), ("(a)" * 100_000, 1), ("(" * 31 + "(a)b" * 20_000 + ")" * 31, 32)],
    ids=["escapes", "brackets", "brackets in brackets"],
)
def test_a_long_prompt_is_parsed_at_once(prompt, deepest, no_hang):
    parts = parse_weights(prompt)
    assert "".join(text for text, _ in parts) == prompt.translate(str.maketrans("", "", "\\()"))
    assert max(weight for _, weight in parts) == pytest.approx(1.1**deepest)


def test_weights_of_one_change_no_bit(generator):
    hidden = torch.randn(2, 5, 8, generator=generator)
    assert torch.equal(weighted(hidden, torch.ones(2, 5)), hidden)


def test_a_weight_scales_its_token_against_the_others_and_keeps_each_mean(generator):
    hidden = torch.randn(2, 5, 8, generator=generator) + 1
    weights = torch.ones(2, 5)
    weights[1, 2] = 1.5
    result = weighted(hidden, weights)
    assert torch.equal(result[0], hidden[0])
    torch.testing.assert_close(result.mean(dim=(1, 2)), hidden.mean(dim=(1, 2)))
    ratios = result[1] / hidden[1]
    torch.testing.assert_close(ratios[2] / ratios[0], torch.full((8,), 1.5))


def test_a_mean_of_nothing_is_no_measure(generator):
    hidden = torch.randn(1, 5, 8, generator=generator)
    weights = torch.tensor([[1.0, 1.2, 1.0, 1.0, 1.0]])
    opposite = torch.cat([hidden, -hidden], dim=2)  # a mean of exactly zero
    assert torch.equal(weighted(opposite, weights), opposite * weights[..., None])
    assert torch.equal(weighted(opposite, torch.ones(1, 5)), opposite)


@pytest.mark.parametrize(("before", "words"), [(16, ["<s>"]), (15, ["<s>"]), (17, ["<s>", "<t>"]), (14, ["<s>"])])
def test_a_learned_word_is_not_divided_between_chunks(before, words, encoder):
    """A chunk has 18 tokens, the words 4 and 2 vectors; as in A1111 a word that does not fit begins the next one."""
    encoder.add_tokens({"<s>": torch.rand(4, 8), "<t>": torch.rand(2, 8)})
    first, last = "a " * before, " ".join([*words, "b"])
    whole = encoder.encode([first + last], "weighted")
    fits = before + 4 <= 18
    parts = [first + words[0], "b"] if fits else [first, last]
    assert torch.equal(whole, torch.cat([encoder.encode([part], "weighted") for part in parts], dim=1))
    assert encoder.chunks(first + last, "weighted") == 2


def test_a_learned_word_of_more_than_a_chunk_is_divided(encoder):
    encoder.add_tokens({"<s>": torch.rand(40, 8)})
    assert encoder.encode(["a <s>"], "weighted").shape[1] == 3 * 20  # 41 tokens, 18 in each
