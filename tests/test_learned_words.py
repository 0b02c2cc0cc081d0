"""Words of textual inversion from files, as the sampling command takes them."""

import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from txt2img_cases import pixels


def test_a_learned_word_that_no_prompt_holds_is_told(sample, work_folder, generator, capsys):
    """Of A1111's file, which has two words, one is enough; most of them are for the negative prompt."""
    rows = 3 * torch.randn(2, 8, generator=generator)
    torch.save({"string_to_param": {"*": rows}, "name": "bad"}, "BadHands.pt")
    told_for = {"'a bad fox'": False, "fox --negative_prompt (badhands:1.2)": False, "'a badger'": True}
    for i, (words, told) in enumerate(told_for.items()):
        assert sample(str(i), "--prompt", *shlex.split(words), "--learned_tokens", "BadHands.pt") == 0
        assert ("warning: BadHands.pt: no prompt holds bad or badhands" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("prompt", "used"), [("a [V] cat", False), (r"a \[v\] cat", True)])
def test_a_word_in_brackets_is_told_as_it_must_be_written(prompt, used, sample, work_folder, generator, capsys):
    save_file({"[V]": 3 * torch.randn(1, 8, generator=generator)}, "v.safetensors")
    assert sample("without", "--prompt", prompt) == 0
    assert sample("with", "--prompt", prompt, "--learned_tokens", "v.safetensors") == 0
    same = np.array_equal(pixels("with/image-0.png"), pixels("without/image-0.png"))
    told = r"warning: v.safetensors: no prompt holds \[v\]" in capsys.readouterr().err
    assert same == told == (not used)


def test_two_steps_of_one_a1111_embedding_are_told_apart_by_their_files(sample, work_folder, generator, capsys):
    for step in (500, 1000):
        rows = 3 * torch.randn(1, 8, generator=generator)
        torch.save({"string_to_param": {"*": rows}, "name": "my_style"}, f"my_style-{step}.pt")
    words = ["--learned_tokens", "my_style-500.pt", "--learned_tokens", "my_style-1000.pt", "--seed", 5]
    assert sample("both", "--prompt", "my_style-500", "--prompt", "my_style-1000", *words) == 0
    assert "my_style-1000.pt: my_style-1000 (1 vectors)" in capsys.readouterr().out
    assert sample("alone", "--prompt", "my_style-1000", "--seed", 6, *words[2:4]) == 0
    assert np.abs(pixels("both/image-6.png") - pixels("alone/image-6.png")).max() <= 1  # batches differ in rounding
    save_file({"my_style": torch.zeros(1, 8)}, "other.safetensors")
    assert sample("no", "--prompt", "x", *words[:2], "--learned_tokens", "other.safetensors") == 2
    assert "other.safetensors: the learned token 'my_style' stands for other embeddings" in capsys.readouterr().err
