"""`moe-lm sample --show-routing`: colours on a terminal, data in a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.terminal import printable
from moe_lm.config.model import ModelConfig
from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.painter import LAST, RESET, Painter, colour
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta
from tests.generate.conftest import MakeRun
from tests.generate.uncached import full_output
from tests.texts import text_of

DEEP = {"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3}


def strongest(session: Session, prompt: str, text_ids: list[int]) -> list[list[list[int]]]:
    """By MoE layer and token, the experts of the position before it by weight, out of one pass over everything."""
    ids = [*session.prompt_ids(prompt, 1), *text_ids]
    before = slice(len(ids) - len(text_ids) - 1, -1)
    return [
        [
            [expert for _, expert in sorted(zip(weights, experts, strict=True), reverse=True)]
            for weights, experts in zip(routing.weights[before].tolist(), routing.experts[before].tolist(), strict=True)
        ]
        for routing in full_output(session.model, ids).routings
    ]


@pytest.fixture
def on_a_terminal(moe_lm: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`moe_lm`, whose output is a terminal. pytest puts other files in place when a test begins."""

    def run(*arguments: object) -> Any:
        for file in (sys.stdout, sys.stderr):
            monkeypatch.setattr(file, "isatty", lambda: True)
        return moe_lm(*arguments)

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


def test_a_pipe_gets_the_experts_of_every_layer(make_run: MakeRun, moe_lm: Callable) -> None:
    run = make_run(**DEEP)
    done = moe_lm("sample", run, "-p", "import", "--max-new-tokens", 9, "--greedy", "--show-routing", "--logprobs")
    [line] = map(json.loads, done.out.splitlines())
    session = Session.load(run)
    expected = strongest(session, "import", [token["id"] for token in line["logprobs"]])
    assert line["experts"] == {"1": expected[0], "2": expected[1]}
    assert len(expected[0]) == line["tokens"] == 9


def test_tokens_have_the_colour_of_their_strongest_expert(make_run: MakeRun, on_a_terminal: Callable) -> None:
    run = make_run(**DEEP)
    done = on_a_terminal("sample", run, "-p", "class", "--max-new-tokens", 30, "--greedy", "--show-routing", 1)
    session = Session.load(run)
    deltas = list(session.complete("class", Settings(30, routing=True)))
    assert re.sub(r"\x1b\[[0-9;]*m", "", done.out) == f"class{printable(text_of(deltas))}\n"
    layer = strongest(session, "class", [delta.step.token for delta in deltas if delta.step.token is not None])[0]
    seen = Counter(experts[0] for experts in layer)
    for expert in seen:
        assert colour(expert) in done.out
        assert f"{colour(expert)}  {RESET} expert {expert:<3} {seen[expert] / 30:6.1%}" in done.err
    assert "layer 1, the strongest" in done.err


def test_without_colours_the_experts_number_stands_behind_the_token(
    run: Path, on_a_terminal: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    done = on_a_terminal("sample", run, "-p", "import", "--num", 2, "--max-new-tokens", 5, "--show-routing")
    assert "\x1b" not in done.out + done.err
    assert re.search(r"\[[0-3]\]", done.out)
    assert "layer 1, the strongest" in done.err


def test_a_colour_ends_before_the_line_does() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    config = ModelConfig(**sizes, num_hidden_layers=1, n_routed_experts=4)
    painter = Painter(config, LAST, colours=True)
    assert painter.paint(Delta(0, "", 0, Step(0, 1, experts=((2, 0),)), None)) == ""
    delta = Delta(0, "a\n b\x1b", 0, Step(0, 1, experts=((3, 1),)), None)
    assert painter.paint(delta) == f"{colour(3)}a{RESET}\n{colour(3)} b␛{RESET}"
    assert painter.legend(colours=False).splitlines()[1:] == ["expert 2    50.0%", "expert 3    50.0%"]
    assert len({colour(expert) for expert in range(64)}) == 64


@pytest.mark.parametrize(
    ("settings", "options", "error"),
    [
        ({"n_routed_experts": 0}, ["--show-routing"], "the model is dense"),
        ({}, ["--show-routing", 0], r"layer 0 \(counted from 0\) has no routed experts; choose one of 1"),
        ({}, ["--show-routing", 7, "--num", 2], "layer 7"),
        ({}, ["--show-routing", "--beams", 2], "--show-routing has no meaning with --beams, which draws nothing"),
    ],
)
def test_routing_that_cannot_be_shown_says_why(
    make_run: MakeRun, moe_lm: Callable, settings: dict[str, int], options: list[object], error: str
) -> None:
    done = moe_lm("sample", make_run(**settings), "-p", "a", *options)
    assert done.code == 2
    assert re.search(f"^error: .*{error}", done.err)
    assert not done.out
