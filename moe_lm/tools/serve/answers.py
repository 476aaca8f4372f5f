"""The bodies that go back, whole or in chunks, as OpenAI's endpoints shape them.

Beside what is theirs a choice has `routing` when the request asked for it: of every token, of every MoE layer, the
experts that predicted it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_lm.generate.decode import Step
from moe_lm.tools.serve.ticket import Piece

LEAST_LOGPROB = -9999.0  # OpenAI's for what is all but impossible; JSON has no -inf
Name = Callable[[int], str]  # a token's own text


class Shape(Protocol):
    """How one of the endpoints writes the choices of its answers."""

    object: str  # of a whole answer
    chunk_object: str
    prefix: str  # of its id

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]: ...
    def chunk(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]: ...
    def logprobs(self, pieces: Sequence[Piece], name: Name) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    shape: Shape
    model: str
    name: Name
    prompt_tokens: int
    logprobs: bool
    routing: bool
    include_usage: bool = False  # in a stream
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, pieces: Sequence[Piece]) -> str:
        """Of all pieces there are, as JSON; the encoder lets no other thread run, so it gets a choice at a time."""
        choices = ",".join(dumps(self._choice(self.shape.whole, part)) for part in _by_row(pieces))
        around = self._around(self.shape.object, []) | {"usage": self.usage(written(pieces))}
        del around["choices"]
        return f'{dumps(around)[:-1]},"choices":[{choices}]}}'

    def chunks(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """One for each row that has something new."""
        parts = [part for part in _by_row(pieces) if self._says_something(part)]
        return [self.chunk([self._choice(self.shape.chunk, part)]) for part in parts]

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._around(self.shape.chunk_object, choices) | ({"usage": None} if self.include_usage else {})

    def usage(self, tokens: int) -> dict[str, int]:
        """For `tokens` that were written."""
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def usage_chunk(self, tokens: int) -> dict[str, Any]:
        return self.chunk([]) | {"usage": self.usage(tokens)}

    def _around(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        number = f"{self.shape.prefix}-{self.number}"
        return {"id": number, "object": kind, "created": self.created, "model": self.model, "choices": list(choices)}

    def _choice(self, write: Callable[[str, str | None, Any], dict[str, Any]], part: Sequence[Piece]) -> dict[str, Any]:
        # There is no word of theirs for a text whose penalties leave no token: it has ended.
        finish = "stop" if part[-1].finish == "exhausted" else part[-1].finish
        chosen = [piece for piece in part if piece.step.token is not None]
        logprobs = self.shape.logprobs(chosen, self.name) if self.logprobs else None
        choice = {"index": part[0].row} | write("".join(piece.text for piece in part), finish, logprobs)
        return choice | ({"routing": [piece.step.experts for piece in chosen]} if self.routing else {})

    def _says_something(self, part: Sequence[Piece]) -> bool:
        """A token may have no text yet: half a character, or the beginning of a stop string."""
        return bool(self.logprobs or self.routing or part[-1].finish or any(piece.text for piece in part))


class CompletionShape:
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    chunk = whole

    def logprobs(self, pieces: Sequence[Piece], name: Name) -> dict[str, Any]:
        return {
            "tokens": [name(_token(piece.step)) for piece in pieces],
            "token_logprobs": [_finite(piece.step.logprob) for piece in pieces],
            "top_logprobs": [self._likeliest(piece.step, name) for piece in pieces],
            "text_offset": [piece.start for piece in pieces],
        }

    def _likeliest(self, step: Step, name: Name) -> dict[str, float]:
        """By text, of equal texts the likeliest; the token itself belongs to it."""
        found: dict[str, float] = {}
        for token, logprob in [*step.alternatives, (_token(step), step.logprob)]:
            found.setdefault(name(token), _finite(logprob))
        return found


class ChatShape:
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """The choice that comes first in a stream."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, pieces: Sequence[Piece], name: Name) -> dict[str, Any]:
        content = []
        for piece in pieces:
            best = [self._probable(token, logprob, name) for token, logprob in piece.step.alternatives]
            own = self._probable(_token(piece.step), piece.step.logprob, name)
            content.append(own | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _probable(self, token: int, logprob: float | None, name: Name) -> dict[str, Any]:
        text = name(token)
        # U+FFFD stands for bytes that are no whole character.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": as_bytes}


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def written(pieces: Sequence[Piece]) -> int:
    """Tokens in them."""
    return sum(piece.step.token is not None for piece in pieces)


def _by_row(pieces: Sequence[Piece]) -> list[list[Piece]]:
    rows: dict[int, list[Piece]] = {}
    for piece in pieces:
        rows.setdefault(piece.row, []).append(piece)
    return [rows[row] for row in sorted(rows)]


def _token(step: Step) -> int:
    assert step.token is not None
    return step.token


def _finite(logprob: float | None) -> float:
    assert logprob is not None
    return max(logprob, LEAST_LOGPROB)
