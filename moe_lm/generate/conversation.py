"""A conversation with a model: its turns, the recent ones that fit, and its form as training data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.common.errors import UsageError
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta
from moe_lm.tokenizer.tokenizer import Message


class Reply(NamedTuple):
    """An answer that is being written, and how many of the oldest messages had to go to make room for it."""

    deltas: Iterator[Delta]
    forgotten: int


class Conversation:
    """Questions and answers in turn; answer n draws with `seed + n`, so that asking again gives another answer."""

    def __init__(self, session: Session, settings: Settings) -> None:
        self.session, self.settings = session, settings
        self.system = ""
        self.turns: list[Message] = []
        self._answers = 0

    def ask(self, question: str) -> Reply:
        """Write the answer to a question. Raises UsageError for a question that is too long by itself."""
        turns = [*self.turns, {"role": "user", "content": question}]
        recent = self._recent(turns)
        deltas = self.session.chat(recent, self.settings.of_row(self._answers))
        self._answers += 1
        return Reply(deltas, len(turns) + bool(self.system) - len(recent))

    def keep(self, question: str, answer: str, whole: bool) -> bool:
        """Append a turn. Returns False, and keeps nothing, when the answer has no words.

        An answer that is not `whole` is marked not to be trained on: it would teach the model to stop halfway.
        """
        if not answer.strip():
            return False
        said: dict[str, Any] = {"role": "assistant", "content": answer}
        self.turns += [{"role": "user", "content": question}, said if whole else said | {"train": False}]
        return True

    def undo(self) -> str:
        """Forget the last turn. Returns its question. Raises UsageError when there is none."""
        if not self.turns:
            raise UsageError("nothing was said yet")
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return str(question)

    def clear(self) -> None:
        """Begin anew, with the same system prompt."""
        self.turns, self._answers = [], 0

    def set_temperature(self, temperature: float) -> None:
        sampling = self.settings.sampling.model_copy(update={"temperature": temperature})
        self.settings = dataclasses.replace(self.settings, sampling=sampling)

    def save(self, file: Path) -> bool:
        """Append the conversation to a JSONL file that fine-tuning reads. Returns whether it can be trained on.

        Raises UsageError when nothing was said or the file cannot be written.
        """
        if not self.turns:
            raise UsageError("nothing was said yet; there is no conversation to save")
        try:
            line = json.dumps({"messages": self._with_system(self.turns)}, ensure_ascii=False).encode("utf-8") + b"\n"
            with file.expanduser().open("ab") as opened:
                opened.write(line)
        except (OSError, RuntimeError, ValueError) as error:  # ~nobody is a RuntimeError, a NUL a ValueError
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"{file} cannot be written ({why}); name another file") from error
        return any(turn.get("train", True) for turn in self.turns[1::2])

    def _recent(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The longest end of the conversation that leaves room for an answer, begun by a question.

        An answer claims at most half of the model's positions. The system prompt and the last question always stay.
        """
        wanted = min(self.settings.max_new_tokens, self.session.model.config.max_position_embeddings // 2)
        shorter = (self._with_system(turns[start:]) for start in range(0, len(turns), 2))
        return next((rest for rest in shorter if self.session.chat_room(rest) >= wanted), self._with_system(turns[-1:]))

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else list(turns)
