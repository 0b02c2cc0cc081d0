"""Configs as they are written: files with their bases, KEY=VALUE overrides, headers; they hold plain values."""

import re
from pathlib import Path

import pytest
from tiny import SMALLEST

from xdiffusion.build import load_config
from xdiffusion.config_files import ConfigError, load_yaml, merge, parse_overrides
from xdiffusion.loading import stored_config

ROOT = Path(__file__).resolve().parent.parent


def test_a_base_lies_below_the_file_that_names_it(write_yaml):
    path = write_yaml(below="a: {x: 1, y: 2}\nlist: [1, 2]", above="base: below.yaml\na: {y: 3}\nlist: [4]")
    assert load_yaml(path) == {"a": {"x": 1, "y": 3}, "list": [4]}


def test_bases_are_relative_to_their_file_nested_and_later_ones_win(tmp_path, monkeypatch):
    (tmp_path / "parts/deep").mkdir(parents=True)
    (tmp_path / "parts/deep/root.yaml").write_text("a: 1\nb: 1\nc: 1")
    (tmp_path / "parts/first.yaml").write_text("base: deep/root.yaml\nb: 2\nc: 2")
    (tmp_path / "parts/second.yaml").write_text("c: 3")
    (tmp_path / "top.yaml").write_text("base: [parts/first.yaml, parts/second.yaml]\nd: 4")
    monkeypatch.chdir(tmp_path / "parts/deep")
    assert load_yaml(tmp_path / "top.yaml") == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_two_files_may_share_a_base(write_yaml):
    path = write_yaml(root="a: 1", left="base: root.yaml", right="base: root.yaml", top="base: [left.yaml, right.yaml]")
    assert load_yaml(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: config.yaml", r"config\.yaml: reads itself through base:"),
        ("base: absent.yaml", r"no config file at .*absent\.yaml"),
        ("base: 5", r"config\.yaml: base=5 must be the path of a \.yaml file or a list"),
        ("base: [5]", r"base=\[5\] must be the path"),
        ("base:", r"base=None must be the path"),
        ("a: [1", r"config\.yaml is not readable YAML: .*line 1"),
        ("a: 1\na: 2", r"not readable YAML: .*duplicate key a"),
        ("5", "it must hold a mapping of sections"),
        ("- a\n- b", "it must hold a mapping of sections"),
        ("base: list.yaml\na: [1]", r"config\.yaml: a=\[1\] is a list, and would be laid over a mapping"),
        ("base: list.yaml\nc: {d: {e: 1}}", r"config\.yaml: c\.d={'e': 1} is a mapping, and would be laid over a list"),
    ],
)
def test_unusable_files_are_named(write_yaml, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_yaml(write_yaml(list="a: {b: 1}\nc: {d: [1]}", config=text))
    assert "\n" not in str(error.value)


def test_what_is_merged_stays_as_it_is():
    below, above = {"a": {"x": 1, "z": [1]}, "b": {"y": 2}}, {"a": {"x": 3}, "b": None, "c": {"d": 4}}
    assert merge("a test", below, above, {"c": {"d": 5}}) == {"a": {"x": 3, "z": [1]}, "b": None, "c": {"d": 5}}
    assert below == {"a": {"x": 1, "z": [1]}, "b": {"y": 2}} and above == {"a": {"x": 3}, "b": None, "c": {"d": 4}}


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_yaml(tmp_path / "config.yaml")


def test_two_files_that_name_each_other_are_a_circle(write_yaml):
    with pytest.raises(ConfigError, match="reads itself"):
        load_yaml(write_yaml(one="base: two.yaml", two="base: one.yaml"))


def test_override_values_are_read_as_yaml():
    overrides = parse_overrides(["a.b=1e-3", "a.c=[1,2]", "a.d=null", "e=true", 'f="no"', "a.b=2e-3", "g=x=y"])
    assert overrides == {
        "a": {"b": 2e-3, "c": [1, 2], "d": None},
        "e": True,
        "f": "no",
        "g": "x=y",
    }


@pytest.mark.parametrize("assignment", ["novalue", "=5", "a.b=[1"])
def test_an_unreadable_override_is_named(assignment):
    with pytest.raises(ConfigError) as error:
        parse_overrides(["fine=1", assignment])
    assert repr(assignment) in str(error.value)
    assert "fine" not in str(error.value)


@pytest.mark.parametrize("words", [["training.batch_size='???'"], ['training="???"'], []])
def test_omegaconfs_missing_value_is_none(write_yaml, words):
    with pytest.raises(ConfigError, match=r"='\?\?\?': OmegaConf's sign of a missing value is none"):
        load_config(write_yaml(config=SMALLEST + ("" if words else "training: ???")), words)
    with pytest.raises(ConfigError, match=r"a header: training\.seed='\?\?\?'"):
        stored_config({"training": {"seed": "???"}}, Path("a header"))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("sampling.cfg_scale", "99999999999999999999", "=99999999999999999999"),
        ("training.seed", "-9223372036854775808", "=-9223372036854775808"),
        ("lora.rank_pattern.to_q", "-1" + 99 * "0", ""),
        ("optimizer.betas.1", f"[0.9, 0x{'f' * 9999}]", ""),
        ("training.batch_size", f"0x{'f' * 9999}", ""),
    ],
)
def test_a_whole_number_that_torch_does_not_hold_is_named(write_yaml, key, value, shown):
    section, name = key.split(".")[:2]
    value = f"{{to_q: {value}}}" if key.count(".") == 2 and "[" not in value else value
    for path, words in (
        (write_yaml(config=SMALLEST), [f"{section}.{name}={value}"]),
        (write_yaml(config=SMALLEST + f"{section}: {{{name}: {value}}}"), []),
    ):
        with pytest.raises(ConfigError, match=rf"{re.escape(key + shown)} must be between -2\^63 and 2\^63"):
            load_config(path, words)
