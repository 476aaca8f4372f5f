"""The verb `sample`: one text as it is written, or many as JSON lines, on a terminal as blocks."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.terminal import colours, printable
from moe_lm.config.generation import SampleConfig
from moe_lm.generate.beams import search
from moe_lm.generate.decode import Settings, Step
from moe_lm.generate.painter import Painter, by_layer
from moe_lm.generate.session import Session
from moe_lm.generate.text import Delta, Row, Speed
from moe_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text to continue, the other keys of its line, and the place that an error names."""

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "the prompt"


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a JSONL file, `-` for stdin: each line is a string, or an object with `prompt`.

    Other keys are carried into the samples. Raises UsageError, with the line, for anything else.
    """
    name = "the input" if str(file) == "-" else str(file)
    prompts = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{name}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UsageError(f'{origin} is not JSON ({error}); expected "text" or {{"prompt": "text"}}') from error
        values = value if isinstance(value, dict) else {"prompt": value}
        if not isinstance(values.get("prompt"), str):
            raise UsageError(f'{origin} has no prompt that is a string; expected "text" or {{"prompt": "text"}}')
        prompts.append(Prompt(values["prompt"], {key: values[key] for key in values if key != "prompt"}, origin))
    if not prompts:
        raise UsageError(f"{name} holds no prompts; expected a JSON line for each")
    return prompts


def read_text(file: Path) -> str:
    """The text of a file, `-` for stdin. Raises UsageError when it cannot be read or is not UTF-8."""
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); name a file of prompts") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "the input" if str(file) == "-" else str(file)
        raise UsageError(f"{name} is not UTF-8 text at byte {error.start}; convert it first") from error


def write_samples(
    session: Session,
    prompts: Sequence[Prompt],
    options: SampleConfig,
    truncate: bool = False,
    out: Path | None = None,
    plain: bool = False,
) -> None:
    """Write `options.num` samples of every prompt to `out` or stdout, and a summary to stderr.

    Sample j of prompt i draws with `seed + i * num + j`. Samples are JSON lines, or blocks on a terminal; `plain` asks
    for the bare text of a single sample, as it is written. `options.show_routing` is the layer whose experts colour the
    text on a terminal.
    """
    show_routing = options.show_routing
    painter = None if show_routing is None else Painter(session.model.config, show_routing, colours(sys.stdout))
    if out is not None or not sys.stdout.isatty():
        painter = None  # the lines hold what it would paint
    ids = [_ids(session, prompt, options.max_new_tokens, truncate) for prompt in prompts]
    if plain:
        settings = Settings.of(options)
        speed = _stream(session.write(ids, settings, options.stop), prompts[0].text, painter)
        summary = f"{speed}, seed {settings.seed}"
        if speed.finish == "length" and speed.tokens < settings.max_new_tokens:
            summary += f"; it ends at the model's last position, {session.model.config.max_position_embeddings}"
    else:
        with _output(out) as file:
            summary = _write_each(_samples(session, ids, options, painter), prompts, file, out)
    if painter is not None:
        print(painter.legend(colours(sys.stderr)), file=sys.stderr)
    print(summary, file=sys.stderr)


def _ids(session: Session, prompt: Prompt, wanted: int, truncate: bool) -> list[int]:
    try:
        return session.prompt_ids(prompt.text, wanted, truncate)
    except UsageError as error:
        raise UsageError(f"{prompt.origin}: {error}") from error


def _stream(deltas: Iterable[Delta], prompt: str, painter: Painter | None) -> Speed:
    """Print a text as it is written, on a terminal after its prompt. Returns how fast it was."""
    at_terminal, speed = sys.stdout.isatty(), Speed()
    if at_terminal:
        print(prompt, end="", flush=True)
    for delta in deltas:
        speed.see(delta)
        shown = painter.paint(delta) if painter else printable(delta.text) if at_terminal else delta.text
        print(shown, end="", flush=True)
    print()
    return speed


def _write_each(
    samples: Iterable[tuple[int, int, dict[str, Any]]], prompts: Sequence[Prompt], file: TextIO, out: Path | None
) -> str:
    """Write samples as they are finished. Returns the summary: how many there were, and how fast."""
    started, written, tokens = time.perf_counter(), 0, 0
    for place, number, sample in samples:
        line = {**prompts[place].extra, "prompt": prompts[place].text, "sample": number, **sample}
        file.write(_block(line) if file.isatty() else json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        written, tokens = written + 1, tokens + sample["tokens"]
    where = "" if out is None else f" in {out}"
    return f"{written} samples{where}, {tokens} tokens, {tokens / (time.perf_counter() - started):.1f} tokens/s"


@contextlib.contextmanager
def _output(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:  # also while it is written: a disk can be full
        raise MoeLmError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def _block(line: Mapping[str, Any]) -> str:
    return f"--- {line['prompt']!r}, sample {line['sample']}, {line['finish']}\n{line['text']}\n"


def _samples(
    session: Session,
    prompts: Sequence[list[int]],
    options: SampleConfig,
    painter: Painter | None,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Number of the prompt, number of the sample and values of every sample, in this order."""
    if options.beams is not None:
        yield from _searched(session, prompts, options)
        return
    settings = Settings.of(options)
    for deltas in _by_row(session.write(prompts, settings, options.stop, options.num)):
        row, steps = deltas[0].row, [delta.step for delta in deltas if delta.step.token is not None]
        values: dict[str, Any] = {
            "text": "".join(delta.text if painter is None else painter.paint(delta) for delta in deltas),
            "finish": deltas[-1].finish,
            "tokens": len(steps),
            "seed": settings.of_row(row).seed,
        }
        if settings.logprobs is not None:
            values["logprobs"] = [_log_probabilities(step, session.tokenizer) for step in steps]
        if settings.routing:
            values["experts"] = by_layer(session.model.config, steps)
        yield row // options.num, row % options.num, values


def _searched(
    session: Session, prompts: Sequence[list[int]], options: SampleConfig
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The best texts of each prompt, the best first, as `_samples` gives them."""
    tokenizer = session.tokenizer

    def ends(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(ids))
        return any(item in text for item in options.stop)

    Row(0, tokenizer.decode, options.stop)  # an empty stop string is refused before the search
    for place, prompt in enumerate(prompts):
        beams = search(session.model, prompt, options, tokenizer.stop_ids, tokenizer.vocab_size, ends)
        for number, beam in enumerate(beams):
            row = Row(number, tokenizer.decode, options.stop)
            steps = [*(Step(number, token) for token in beam.ids), Step(number, None, beam.finish)]
            text = "".join(row.take(step).text for step in steps)
            yield place, number, {"text": text, "finish": beam.finish, "tokens": len(beam.ids), "score": beam.score}


def _by_row(deltas: Iterable[Delta]) -> Iterator[list[Delta]]:
    """All deltas of each row, in the order of the rows, as soon as the row and those before it have ended."""
    rows: defaultdict[int, list[Delta]] = defaultdict(list)
    next_row = 0
    for delta in deltas:
        rows[delta.row].append(delta)
        while rows[next_row] and rows[next_row][-1].finish:
            yield rows.pop(next_row)
            next_row += 1


def _log_probabilities(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token's log-probability, and those of the likeliest tokens beside it."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        return {"id": token, "token": tokenizer.decode([token], skip_special=False), "logprob": logprob}

    assert step.token is not None
    return named(step.token, step.logprob) | {"top": [named(*pair) for pair in step.alternatives]}
