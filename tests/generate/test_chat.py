"""`moe-lm chat` through a pipe: plain lines in, plain answers out, and what the commands do."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import ChatSource
from moe_lm.data.records import read_dialogues
from moe_lm.generate import chat as verb
from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling
from moe_lm.generate.text import Delta
from moe_lm.text.files import Report
from tests.texts import text_of

Talk = Callable[..., tuple[str, str]]
PIECE = Delta(0, "a piece", 0, Step(0, 9), None)


@pytest.fixture
def chat(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines into a greedy chat; returns what it writes to stdout and to stderr."""

    def talk(typed: str, **changes: Any) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        verb.chat(run, Settings(12, Sampling(temperature=0.0), **changes))
        return capsys.readouterr()

    return talk


@pytest.fixture
def talk(session: Session) -> verb.Chat:
    return verb.Chat(verb.Conversation(session, Settings(12, Sampling(temperature=0.0))), at_terminal=False)


def answers(session: Session, *questions: str, system: str = "") -> list[str]:
    """What a conversation of these questions should give."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    told = len(messages)
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": text_of(session.chat(messages, Settings(12)))})
    return [message["content"] for message in messages[told + 1 :: 2]]


def test_chat_remembers_the_conversation_until_quit(session: Session, chat: Talk) -> None:
    out, _ = chat("a\n\n b \n/quit\nc\n")
    first, second = answers(session, "a", "b")
    assert out == f"{first}\n{second}\n"
    assert second != answers(session, "b")[0]


def test_chat_ends_with_its_input(chat: Talk) -> None:
    assert chat("")[0] == "\n"


def test_chat_forgets_the_oldest_messages_when_the_model_has_no_room(session: Session, chat: Talk) -> None:
    long = "1 2 3 4 5 6 7 8 9 " * 2
    assert session.chat_room([{"role": "user", "content": long}]) >= 12
    out, err = chat(f"a\nb\n{long}\n")
    assert "(only the last 1 messages fit)" in err
    assert out.endswith(f"\n{answers(session, long.strip())[0]}\n\n")


def test_chat_goes_on_after_a_question_that_is_too_long(session: Session, chat: Talk) -> None:
    out, err = chat("1 2 3 4 5 6 7 8 9 " * 20 + "\na\n/quit\n")
    assert "error: the prompt has" in err
    assert out == answers(session, "a")[0] + "\n"


def test_chat_refuses_input_that_is_not_utf8(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(UsageError, match="input is not UTF-8 text"):
        verb.chat(run, Settings(1))


class InterruptedOutput(io.StringIO):
    """A terminal whose user presses Ctrl-C when the second piece of text appears."""

    pieces = 0

    def write(self, text: str) -> int:
        self.pieces += bool(text.strip())
        if self.pieces == 2:
            self.pieces += 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    session: Session, chat: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = InterruptedOutput()
    monkeypatch.setattr(sys, "stdout", output)
    chat("a\nb\n/quit\n")
    [whole] = answers(session, "a")

    def then(shown: str) -> str:
        """The answer to the second question after a first one that was stopped there."""
        messages = [("user", "a"), ("assistant", shown), ("user", "b")]
        conversation = [{"role": role, "content": content} for role, content in messages]
        return text_of(session.chat(conversation, Settings(12)))

    # The model is not trained, and may write line ends of its own.
    assert output.getvalue() in [f"{whole[:end]}\n{then(whole[:end])}\n" for end in range(1, len(whole))]


@pytest.mark.parametrize("pieces", [0, 1])
def test_an_answer_stays_when_another_one_is_stopped(
    talk: verb.Chat, pieces: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.through(["a", "b"])
    before = list(talk.conversation.turns)

    def written(*_: object) -> Iterator[Delta]:
        yield from [PIECE] * pieces
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "chat", written)
    talk.through(["/retry"])
    assert talk.conversation.turns == before
    assert "(the previous answer stays)" in capsys.readouterr().err


def test_the_conversation_outlives_an_answer_that_fails(
    talk: verb.Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.through(["a"])
    before = list(talk.conversation.turns)

    def failing(*_: object) -> Iterator[Delta]:
        yield PIECE
        raise MoeLmError("the logits are broken")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "chat", failing)
        talk.through(["b", "/retry"])
    assert talk.conversation.turns == before
    captured = capsys.readouterr()
    assert captured.err.count("error: the logits are broken") == 2
    assert captured.out.endswith("\na piece\na piece\n")


def test_what_is_not_utf8_is_refused_where_it_is_typed(
    talk: verb.Chat, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.through(["/system caf\udce9", "caf\udce9", "a"])
    captured = capsys.readouterr()
    assert "error: /system is not UTF-8 text at character 3" in captured.err
    assert "error: the question is not UTF-8 text at character 3" in captured.err
    assert captured.out == answers(session, "a")[0] + "\n"


def test_commands_change_the_conversation(session: Session, chat: Talk) -> None:
    out, err = chat("/system Be short.\na\nb\n/undo\nc\n/new\nd\n/system\n/new\na\n")
    told_a, told_c = answers(session, "a", "c", system="Be short.")
    _, told_b = answers(session, "a", "b", system="Be short.")
    [told_d] = answers(session, "d", system="Be short.")
    [plain_a] = answers(session, "a")
    assert out == "\n".join([told_a, told_b, told_c, told_d, plain_a, "", ""])
    assert told_a != plain_a
    assert "(forgotten: 'b')" in err


def test_retry_draws_another_answer_to_the_same_question(session: Session, chat: Talk) -> None:
    out, _ = chat("/temp 3\na\n/retry\n/temp 0\n/retry\n", seed=4)
    question = [{"role": "user", "content": "a"}]
    drawn = [text_of(session.chat(question, Settings(12, Sampling(temperature=3.0), seed))) for seed in (4, 5)]
    assert out == "\n".join([*drawn, *answers(session, "a"), "", ""])
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sytem be kind", "there is no command /sytem; did you mean /system?"),
        ("/xyz", "there is no command /xyz; /help lists them"),
        ("/temp hot", "/temp 'hot' is not a number of at least 0; it is 0.0 now"),
        ("/temp -1", "/temp '-1' is not a number of at least 0; it is 0.0 now"),
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "nothing was said yet"),
        ("/undo", "nothing was said yet"),
        ("/quit now", "/quit takes no argument, but 'now' was given"),
        ("/help", "/save FILE"),
    ],
)
def test_a_command_that_cannot_be_says_why(
    talk: verb.Chat, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.through([line])
    assert said in capsys.readouterr().err


def test_a_path_is_no_command(chat: Talk) -> None:
    assert "no command" not in chat("/usr/bin/env\n")[1]


def test_a_saved_conversation_is_what_fine_tuning_reads(session: Session, tmp_path: Path) -> None:
    conversation = verb.Conversation(session, Settings())
    conversation.system = "Be short."
    assert conversation.keep("a", "whole", whole=True)
    assert conversation.keep("b", "cut of", whole=False)
    assert not conversation.keep("c", " \n", whole=True)
    file = tmp_path / "talk.jsonl"
    assert conversation.save(file)
    conversation.clear()
    conversation.keep("d", "cut", whole=False)
    assert not conversation.save(file)
    report = Report()
    [row] = read_dialogues([ChatSource(path=str(file))], report)
    assert row.content.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "whole"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "cut of", "train": False},
    ]
    assert "every assistant message is masked" in "".join(report.skipped_lines())
    _, trained = session.tokenizer.encode_chat(row.content.messages)
    assert 0 < sum(trained) < len(trained)


def test_a_conversation_that_cannot_be_written_says_why(session: Session, tmp_path: Path) -> None:
    conversation = verb.Conversation(session, Settings())
    conversation.keep("a", "b", whole=True)
    for name, why in {
        f"{tmp_path}/none/talk.jsonl": r"none/talk.jsonl cannot be written \(No such file or directory\)",
        "~nosuchuser/talk.jsonl": r"~nosuchuser/talk.jsonl cannot be written \(Could not determine home directory.\)",
        f"{tmp_path}/a\0b": r"cannot be written \(embedded null byte\)",
        f"{tmp_path}/\ud800": r"cannot be written \(.* surrogates not allowed\)",
    }.items():
        with pytest.raises(UsageError, match=why):
            conversation.save(Path(name))
    conversation.system = "half \ud800"
    with pytest.raises(UsageError, match="surrogates not allowed"):
        conversation.save(tmp_path / "talk.jsonl")
    assert not (tmp_path / "talk.jsonl").exists()


def test_an_answer_that_was_cut_is_not_trained_on(chat: Talk, tmp_path: Path) -> None:
    chat(f"a\n/save {tmp_path / 'talk.jsonl'}\n")
    [line] = (tmp_path / "talk.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][1]["train"] is False  # 12 tokens, and the model had more to say


def test_a_run_without_a_chat_template_is_refused(chat: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.tokenizer.tokenizer.Tokenizer.has_chat_template", False)
    with pytest.raises(UsageError, match=r"has no chat template.*moe-lm sample"):
        chat("a\n")
