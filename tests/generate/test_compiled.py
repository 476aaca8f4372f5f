"""Compiled decoding gives the tokens of decoding that is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.generate.session import Session
from tests.conftest import Done
from tests.generate.test_cached import needs_compiler

MoeLm = Callable[..., Done]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of what is compiled; it is traced, but inductor's half minute of building kernels is left out."""
    found: list[str] = []

    def trace(function: Callable[..., Any], *, mode: str, **options: Any) -> Callable[..., Any]:
        found.append(mode)
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", trace)
    return found


@needs_compiler
def test_every_way_of_sampling_can_be_compiled(moe_lm: MoeLm, run: Path, tmp_path: Path, programs: list[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('"import "\n"def f("\n')
    always = ("--seed", 3, "--max-new-tokens", 6)
    ways = [("-p", "import "), ("-p", "import ", "--num", 3), ("--file", tmp_path / "prompts.jsonl")]
    for number, options in enumerate(ways, 1):
        expected = moe_lm("sample", run, *options, *always)
        assert (expected.code, len(programs)) == (0, number - 1)
        assert moe_lm("sample", run, *options, *always, "--compile").out == expected.out
        assert programs == ["default"] * number


@needs_compiler
@pytest.mark.slow
def test_a_compiled_sample_is_the_one_that_is_not(moe_lm: MoeLm, run: Path) -> None:
    options = ("-p", "import ", "--num", 3, "--seed", 3, "--max-new-tokens", 6)
    assert moe_lm("sample", run, *options, "--compile").out == moe_lm("sample", run, *options).out


@needs_compiler
def test_prompts_of_other_lengths_find_what_was_compiled_before(run: Path) -> None:
    session = Session.load(run, "cpu", compiled=True)
    assert session.capacity_for([[1] * 3], 200) == session.capacity_for([[1] * 9, [1]], 190)


def test_what_does_not_compile_is_refused_in_a_sentence(
    moe_lm: MoeLm, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb, *options in (
        ("sample", "-p", "a", "--beams", "2"),
        ("sample", "-p", "a", "--device-map", "auto"),
        ("serve", "--device-map", "auto"),
    ):
        done = moe_lm(verb, run, *options, "--compile")
        assert done.code == 2
        assert f"--compile and {options[-2]} do not go together; leave one of them out" in done.err
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    for verb, *options in (("sample", "-p", "a"), ("serve", "--port", "0")):
        done = moe_lm(verb, run, *options, "--compile")
        assert done.code == 2
        needed = "a C++ compiler (Debian: apt-get install g++); install it, or leave it"
        assert f"compiled decoding needs {needed}" in done.err


def test_a_chat_is_not_compiled_since_each_answer_would_be_another_program(moe_lm: MoeLm, run: Path) -> None:
    done = moe_lm("chat", run, "--compile")
    assert done.code == 2
    assert "No such option: --compile" in done.err


@pytest.mark.slow
@needs_compiler
def test_a_compiler_that_fails_ends_in_a_sentence(start_moe_lm: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    process = start_moe_lm("sample", run, "-p", "a", "--compile", CXX="false", TORCHINDUCTOR_CACHE_DIR=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "the decoding step does not compile here" in err.splitlines()[-1]
    assert "Traceback" not in err
