"""The verbs `sample` and `chat`: the text on stdout, everything about it on stderr."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lm.errors import UsageError
from moe_lm.generate.completion import Completion
from moe_lm.generate.decode import Settings
from moe_lm.generate.penalties import NO_PENALTIES, Penalties
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling
from moe_lm.tokenization import Message


def sample(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str],
    truncate: bool = False,
    base: Path | None = None,
    **more: Any,
) -> None:
    """Write the text that follows `prompt`; on a terminal after the prompt itself. `more` is as in `settings_of`."""
    settings = settings_of(max_new_tokens, temperature, top_k, top_p, seed, **more)
    session = Session.load(run, base=base)
    text = session.complete(prompt, settings, stop, truncate)
    if sys.stdout.isatty():
        print(prompt, end="", flush=True)
    clock = []
    for piece in text:
        print(piece, end="", flush=True)
        clock.append((time.perf_counter(), text.tokens))
    print()
    print(f"{text.tokens} tokens{_speed(clock)}, seed {settings.seed}", file=sys.stderr)


def chat(
    run: Path,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    base: Path | None = None,
) -> None:
    """Talk until /quit or Ctrl-D; Ctrl-C stops an answer, which stays in the conversation as far as it went."""
    settings = settings_of(max_new_tokens, temperature, top_k, top_p, seed)
    session = Session.load(run, base=base)
    # The first forward pass imports parts of torch: a Ctrl-C meant for the answer would leave them half imported.
    list(session.complete("", Settings(max_new_tokens=1)))
    print("Ctrl-C stops an answer; /quit or Ctrl-D ends the chat", file=sys.stderr)
    messages: list[Message] = []
    for question in _questions():
        messages.append({"role": "user", "content": question})
        recent = _recent(session, messages, settings.max_new_tokens)
        try:
            answer = session.chat(recent, settings)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        if len(recent) < len(messages):
            print(f"(only the last {len(recent)} messages fit)", file=sys.stderr)
        messages.append({"role": "assistant", "content": _show(answer)})


def settings_of(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    min_p: float | None = None,
    typical_p: float | None = None,
    penalties: Penalties = NO_PENALTIES,
    min_new_tokens: int = 0,
    logprobs: int | None = None,
) -> Settings:
    """What a command line asked for; without a seed one is drawn."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, penalties)
    return Settings(max_new_tokens, sampling, seed, min_new_tokens, logprobs)


def _speed(clock: Sequence[tuple[float, int]]) -> str:
    """From the time and the tokens at each piece. The first piece is left out, which waits for what is slow once."""
    if len(clock) < 2:
        return ""
    (begun, before), (ended, tokens) = clock[0], clock[-1]
    return f", {(tokens - before) / (ended - begun):.1f} tokens/s"


def _questions() -> Iterator[str]:
    """What the user types, line by line; on a terminal with the keys and the history of readline."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            raise UsageError("the input is not UTF-8 text; convert it first") from error
        if line == "/quit":
            return
        if line:
            yield line


def _recent(session: Session, messages: Sequence[Message], wanted: int) -> Sequence[Message]:
    """The conversation from the first question on that leaves room for an answer of `wanted` tokens.

    An answer claims at most half of the model's positions, and the last question always stays.
    """
    wanted = min(wanted, session.model.config.max_position_embeddings // 2)
    starts = range(0, len(messages), 2)
    return next((messages[start:] for start in starts if session.chat_room(messages[start:]) >= wanted), messages[-1:])


def _show(answer: Completion) -> str:
    """Print an answer as it comes, until it or Ctrl-C ends it; what was printed."""
    shown = ""
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            shown += piece
    except KeyboardInterrupt:
        pass
    print()
    return shown
