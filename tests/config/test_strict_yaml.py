"""YAML of users and of strangers: no key twice, aliases within bounds, and one sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.strict_yaml import MOST_CHARACTERS, parse_section, parse_yaml
from tests.config.test_run import PRETRAIN, write

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_anchors_may_be_used(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert parse_section(text, "f") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "f: a is set twice, in line 1 and in line 3; remove one of them"),
        ("train:\n  steps: 1\n  lr: 2\n  'steps': 3\n", "f: train.steps is set twice, in line 2 and in line 4"),
        ("a: [{b: 1, b: 1}]", "f: a.b is set twice, in line 1 and in line 1"),
        (LAUGHS, "f stands for more than 100000 values, most of them by aliases; write them out"),
        (MERGES, "f stands for more than 100000 values"),
        ("a: &a [*a]", "f: the alias of line 1 contains itself; write it out"),
        ("a: " + "[" * 5000 + "]" * 5000, "f: lists and sections are nested too deep; flatten them"),
        ("a: 0x" + "f" * 5000, "f is not valid YAML: the integer in line 1 has more than 64 bits"),
        ("a: " + "9" * 5000, "f is not valid YAML: "),
        ("a: 9999-99-99", "f is not valid YAML: "),
        ("a: !!python/object/apply:os.system [true]", "f is not valid YAML: could not determine a constructor"),
        ("{[a]: 1}", "f is not valid YAML: "),
        ("1: 2", "f: the key 1 is not a word; write the name of a setting"),
        ("x" * (MOST_CHARACTERS + 1), f"f has more than {MOST_CHARACTERS} characters; is it a config?"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_section(text, "f")
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("text", "value"), [("18446744073709551615", 2**64 - 1), ("", None), ("&a [1]", [1])])
def test_values(text: str, value: Any) -> None:
    assert parse_yaml(text, "f") == value


def test_a_key_twice_in_a_config_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", PRETRAIN)
    lines = path.read_text().count("\n")
    path.write_text(path.read_text() + "run_dir: elsewhere\n")
    with pytest.raises(UsageError, match=rf"run_dir is set twice, in line \d+ and in line {lines + 1}; remove one"):
        load_config(PretrainConfig, path)


def test_a_key_twice_in_an_override_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", PRETRAIN)
    with pytest.raises(UsageError, match=r"override 'train=\{steps: 1, steps: 2\}': steps is set twice"):
        load_config(PretrainConfig, path, ["train={steps: 1, steps: 2}"])


def test_a_config_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(UsageError, match=f"has more than {MOST_CHARACTERS} characters"):
        load_config(PretrainConfig, Path("/dev/zero"))


def test_a_section_in_a_file_with_an_impossible_name_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", PRETRAIN | {"model": "a\0b"})
    with pytest.raises(UsageError, match=r"cannot read the config '.*': embedded null byte"):
        load_config(PretrainConfig, path)
