"""The chat at a terminal: keys in, lines out, and one whole chat in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from moe_lm.common.terminal import printable
from moe_lm.config.data import ChatSource
from moe_lm.data.records import read_dialogues
from moe_lm.generate.typed import history_file, typed_lines
from moe_lm.model.transformer import LanguageModel
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.generate.conftest import MakeRun
from tests.processes import ROOT

ENTER, NEW_LINE, UP, CTRL_A, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x01", "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"


def lines_of(*keys: str, history: bool = True) -> list[str]:
    """What these keys give, of which each piece comes after the lines that the pieces before it gave."""
    with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
        lines, found = typed_lines(["/help", "/quit"], history), []
        for piece in keys:
            typed.send_text(piece)
            found += list(islice(lines, piece.count(ENTER) - piece.count(NEW_LINE) or None))
        return found


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_enter_sends_and_alt_enter_begins_a_new_line() -> None:
    assert lines_of(f"one{NEW_LINE}two{ENTER}", f"rld{CTRL_A}wo{ENTER}") == ["one\ntwo", "world"]


def test_lines_that_are_pasted_stay_together() -> None:
    assert lines_of(PASTE.format("one\ntwo\n") + "three" + ENTER) == ["one\ntwo\nthree"]


def test_what_was_typed_is_found_in_the_next_chat(state: Path) -> None:
    lines_of(f"secret{NEW_LINE}plan{ENTER}")
    assert history_file() == state / "moe-lm" / "chat_history"
    assert history_file().stat().st_mode & 0o077 == 0
    assert lines_of(UP + ENTER) == ["secret\nplan"]


def test_without_history_nothing_is_written(state: Path) -> None:
    assert lines_of(f"secret{ENTER}", UP + ENTER, history=False) == ["secret", "secret"]
    assert not state.exists()


def test_a_history_that_cannot_be_written_or_read_is_done_without(state: Path) -> None:
    state.write_text("a file where the folder should be")
    assert lines_of("a" + ENTER, "b" + ENTER) == ["a", "b"]
    state.unlink()
    history_file().mkdir(parents=True)
    assert lines_of("c" + ENTER) == ["c"]


def test_without_a_home_folder_the_history_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert lines_of("a" + ENTER, UP + ENTER) == ["a", "a"]


def test_ctrl_d_ends_and_ctrl_c_does_when_it_comes_twice() -> None:
    assert lines_of("a" + ENTER, CTRL_D) == ["a"]
    with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
        lines = typed_lines([])
        for keys in ("lost", "lost too"):
            typed.send_text(keys + CTRL_C)
        typed.send_text("kept" + ENTER)
        assert next(lines) == "kept"
        typed.send_text(CTRL_C + CTRL_C)
        assert list(lines) == []


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07\x7f\x9b") == "a␛[2Jb\n\tc␇␡\ufffd"


class Terminal:
    """A process with a terminal of its own, what it has shown, and a keyboard."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._keyboard, inside = os.openpty()
        termios.tcsetwinsize(inside, (24, 200))
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moe_lm", *map(str, arguments)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=os.environ | variables | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(inside)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def answer_with(self, keys: str, then: str) -> None:
        """Wait for the prompt, type, and wait for what it leads to."""
        self.wait_for(">")
        self.type(keys)
        self.wait_for(then)

    def wait_for(self, text: str) -> None:
        """Read on until this is shown; what was shown until then is forgotten."""
        deadline = time.monotonic() + 120
        while text not in self.shown:
            ready, _, _ = select.select([self._keyboard], [], [], max(0, deadline - time.monotonic()))
            try:
                read = os.read(self._keyboard, 1 << 16) if ready else b""
            except OSError:  # the other side is closed
                read = b""
            assert read, f"{text!r} did not come after {self.shown!r}"
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read.decode(errors="replace"))
        self.shown = self.shown.partition(text)[2]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._keyboard)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, **environment))
        return opened[-1]

    yield start
    for item in opened:
        item.close()


def test_a_chat_in_a_terminal(
    make_run: MakeRun, terminal: Callable[..., Terminal], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    [mark] = tiny_tokenizer.encode("!")

    def shout(model: LanguageModel) -> None:
        """Nothing but !, which at temperature 1 ends once in 150 tokens."""
        with torch.no_grad():
            model.lm_head.bias[mark] = 100
            model.lm_head.bias[tiny_tokenizer.end_id] = 95

    run = make_run(shout, initializer_range=0.001, max_position_embeddings=8192)
    chat = terminal("chat", run, "--max-new-tokens", 4000, "--temperature", 0, "--seed", 1)
    chat.wait_for("Ctrl-D: end")
    chat.answer_with("a long one" + ENTER, "!!!!!!!!")
    chat.type(CTRL_C)
    chat.wait_for(", stopped")
    chat.answer_with("/te\t", "mp")  # completed
    chat.type(" 1" + ENTER)
    chat.wait_for("(temperature 1.0)")
    chat.answer_with(f"first{NEW_LINE}second{ENTER}", "tokens/s")
    chat.answer_with(PASTE.format("third\nfourth") + ENTER, "tokens/s")
    chat.answer_with(f"/save {tmp_path / 'talk.jsonl'}{ENTER}", "(appended to")
    chat.wait_for(">")
    chat.type(CTRL_D)
    assert chat.process.wait(timeout=60) == 0

    questions = [message["content"] for message in json.loads((tmp_path / "talk.jsonl").read_text())["messages"][::2]]
    assert questions == ["a long one", "first\nsecond", "third\nfourth"]
    [row] = read_dialogues([ChatSource(path=str(tmp_path / "talk.jsonl"))], Report())
    answers = [message for message in row.content.messages if message["role"] == "assistant"]
    assert all(set(message["content"]) == {"!"} for message in answers)
    assert [message.get("train", True) for message in answers] == [False, True, True]
    assert len(answers[0]["content"]) < 4000
