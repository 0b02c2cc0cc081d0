"""Prompts of a command line: the slot {class}, repetition to length, and what is refused."""

import pytest

from xdiffusion.data.captions import PROMPT_TABLES, PromptTable
from xdiffusion.prompts import expand_prompts

TABLE = PromptTable(names=(("cat", "kitten"), ("dog",), ("bird",)), templates=("{}", "a {}"))


def test_without_prompts_every_class_by_its_plainest_caption():
    assert expand_prompts([], TABLE, None) == ["cat", "dog", "bird"]
    assert expand_prompts([], PROMPT_TABLES["image/digits"], None) == [str(digit) for digit in range(10)]


def test_the_slot_stands_for_every_class_in_turn():
    assert expand_prompts(["a small {class}"], TABLE, None) == ["a small cat", "a small dog", "a small bird"]
    assert expand_prompts(["{class} and {class}"], TABLE, 2) == ["cat and cat", "dog and dog"]


def test_plain_prompts_are_kept_as_they_are_and_in_order():
    assert expand_prompts(["x", "{class}", ""], TABLE, None) == ["x", "cat", "dog", "bird", ""]


@pytest.mark.parametrize(("count", "expected"), [(1, ["a"]), (3, ["a", "b", "a"]), (None, ["a", "b"])])
def test_prompts_take_turns_up_to_the_count(count, expected, capsys):
    assert expand_prompts(["a", "b"], TABLE, count) == expected
    said = "1 images end before --prompt 'b', which is not drawn\n" if count == 1 else ""
    assert capsys.readouterr().err == said


def test_classes_that_are_not_reached_are_no_prompts_left_out(capsys):
    assert expand_prompts(["a {class}", "x"], TABLE, 2) == ["a cat", "a dog"]
    assert "'x', which is not drawn" in capsys.readouterr().err
    assert expand_prompts([], TABLE, 2) == ["cat", "dog"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prompt", ["a {clas}", "{Class}", "{class} on {colour}", "{ class }", "{}"])
def test_another_slot_is_refused_with_the_one_that_is_allowed(prompt):
    with pytest.raises(ValueError, match=r"has the unknown slot \{.*\}; allowed: \{class\}") as error:
        expand_prompts(["fine", prompt], TABLE, None)
    assert repr(prompt) in str(error.value)


@pytest.mark.parametrize("prompt", ["a {class", "class}", "{class} on {", "}{"])
def test_a_brace_without_its_other_one_is_refused(prompt):
    with pytest.raises(ValueError, match=r"a brace without its other one; allowed: \{class\}"):
        expand_prompts([prompt], TABLE, None)
    assert expand_prompts(["a fox {"], None, 1) == ["a fox {"]  # a text like any other where there are no slots


def test_without_classes_prompts_are_needed_and_have_no_slots():
    assert expand_prompts(["a fox", "a cat"], None, 3) == ["a fox", "a cat", "a fox"]
    with pytest.raises(ValueError, match=r"no classes to draw: .*--prompt"):
        expand_prompts([], None, 2)
    with pytest.raises(ValueError, match=r"unknown slot \{class\}; this model has no classes"):
        expand_prompts(["a {class}"], None, 2)


@pytest.mark.parametrize("prompt", ["{clas}", "{class", "\udcff"])
def test_a_mistake_is_said_of_the_place_where_it_stands(prompt):
    with pytest.raises(ValueError, match=r"^training.sample_prompts '"):
        expand_prompts([prompt], TABLE, None, "training.sample_prompts")
