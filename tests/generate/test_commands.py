"""`moe-lm sample` and `moe-lm chat` as a user meets them: what is on stdout, what on stderr, how they end."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.errors import UsageError
from moe_lm.generate import commands
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling

MakeRun = Callable[..., Path]


def sample(run: Path, **changes: object) -> None:
    options = {"max_new_tokens": 20, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0, "stop": ()}
    commands.sample(run, "import ", **options | changes)  # type: ignore[arg-type]


def chat(run: Path, typed: str, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    options = {"max_new_tokens": 12, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    commands.chat(run, **options | changes)  # type: ignore[arg-type]


def answers(session: Session, *questions: str) -> list[str]:
    """What a conversation of these questions should give."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": "".join(session.chat(messages, Settings(12)))})
    return [message["content"] for message in messages[1::2]]


def test_sample_writes_the_text_alone_and_its_speed_beside_it(
    session: Session, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run)
    captured = capsys.readouterr()
    assert captured.out == "".join(session.complete("import ", Settings(20, GREEDY))) + "\n"
    assert re.fullmatch(r"20 tokens, \d+\.\d tokens/s, seed 0\n", captured.err)


def test_one_token_has_no_speed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(run, max_new_tokens=1)
    assert capsys.readouterr().err == "1 tokens, seed 0\n"


def test_sample_without_a_seed_says_the_one_that_gives_the_same_text(
    session: Session, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(run, temperature=1.5, top_k=100, top_p=0.9, seed=None, stop=["zz"])
    captured = capsys.readouterr()
    seed = int(captured.err.split()[-1])
    settings = Settings(20, Sampling(1.5, top_k=100, top_p=0.9), seed)
    assert captured.out == "".join(session.complete("import ", settings, ["zz"])) + "\n"


def test_chat_remembers_the_conversation_until_quit(
    session: Session, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(run, "a\n\n b \n/quit\nc\n", monkeypatch)
    first, second = answers(session, "a", "b")
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert second != answers(session, "b")[0]


def test_chat_ends_with_its_input(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(run, "", monkeypatch)
    assert capsys.readouterr().out == "\n"


def test_chat_forgets_the_oldest_messages_when_the_model_has_no_room(
    session: Session, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "1 2 3 4 5 6 7 8 9 " * 2
    assert session.chat_room([{"role": "user", "content": long}]) >= 12
    chat(run, f"a\nb\n{long}\n", monkeypatch)
    captured = capsys.readouterr()
    assert "(only the last 1 messages fit)" in captured.err
    assert captured.out.endswith(f"\n{answers(session, long.strip())[0]}\n\n")


def test_chat_goes_on_after_a_question_that_is_too_long(
    session: Session, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(run, "1 2 3 4 5 6 7 8 9 " * 20 + "\na\n/quit\n", monkeypatch)
    captured = capsys.readouterr()
    assert "error: the prompt has" in captured.err
    assert captured.out == answers(session, "a")[0] + "\n"


def test_chat_refuses_input_that_is_not_utf8(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(UsageError, match="input is not UTF-8 text"):
        commands.chat(run, max_new_tokens=1, temperature=0.0, top_k=None, top_p=None, seed=0)


class InterruptedOutput(io.StringIO):
    """A terminal whose user presses Ctrl-C when the second piece of text appears."""

    pieces = 0

    def write(self, text: str) -> int:
        self.pieces += bool(text.strip())
        if self.pieces == 2:
            self.pieces += 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_chat(session: Session, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = InterruptedOutput()
    monkeypatch.setattr(sys, "stdout", output)
    chat(run, "a\nb\n/quit\n", monkeypatch)
    [whole] = answers(session, "a")

    def then(shown: str) -> str:
        """The answer to the second question after a first one that was stopped there."""
        messages = [("user", "a"), ("assistant", shown), ("user", "b")]
        conversation = [{"role": role, "content": content} for role, content in messages]
        return "".join(session.chat(conversation, Settings(12)))

    # The model is not trained, and may write line ends of its own.
    assert output.getvalue() in [f"{whole[:end]}\n{then(whole[:end])}\n" for end in range(1, len(whole))]


def test_sampling_imports_nothing_that_only_training_needs(run: Path) -> None:
    program = (
        "import sys; from moe_lm.cli import main\n"
        f"sys.argv = ['moe-lm', 'sample', {str(run)!r}, '--prompt', '', '--max-new-tokens', '2', '--greedy']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "found = sys.modules.keys() & {'deepspeed', 'accelerate', 'datasets', 'pyarrow', 'transformers'}\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
