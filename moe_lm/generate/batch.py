"""Many samples of many prompts, as JSON lines or as blocks on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.terminal import colours
from moe_lm.generate.beams import BeamSettings, search
from moe_lm.generate.completion import Completion, Writer
from moe_lm.generate.decode import SLOTS, Settings, Step
from moe_lm.generate.painter import Painter, by_layer
from moe_lm.generate.session import Session


@dataclass(frozen=True)
class Prompt:
    """A text to continue, what else its line says, and where it comes from."""

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "the prompt"


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a JSONL file, `-` for stdin: each line a string, or an object with `prompt`.

    Other keys are carried into the samples. Raises UsageError, with the line, for what is none.
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
            raise UsageError(f'{origin} has no prompt that is a text; expected "text" or {{"prompt": "text"}}')
        prompts.append(Prompt(values["prompt"], {key: values[key] for key in values if key != "prompt"}, origin))
    if not prompts:
        raise UsageError(f"{name} holds no prompt; expected a JSON line for each")
    return prompts


def read_text(file: Path) -> str:
    """A whole file, `-` for stdin. Raises UsageError when it cannot be read or is not UTF-8."""
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
    num: int,
    settings: Settings | BeamSettings,
    stop: Sequence[str] = (),
    truncate: bool = False,
    out: Path | None = None,
    show_routing: int | None = None,
) -> None:
    """`num` samples of every prompt: JSON lines into `out` or a pipe, blocks on a terminal; a summary on stderr.

    Sample j of prompt i draws with `seed + i * num + j`. `show_routing` is the layer whose experts colour the blocks.
    """
    painter = None if show_routing is None else Painter(session.model.config, show_routing, colours(sys.stdout))
    if out is not None or not sys.stdout.isatty():
        painter = None  # lines hold what it would paint
    ids = [_ids(session, prompt, settings.max_new_tokens, truncate) for prompt in prompts]
    started, written, tokens = time.perf_counter(), 0, 0
    if isinstance(settings, BeamSettings):
        samples = _beams(session, ids, settings, stop)
    else:
        samples = _draws(session, ids, num, settings, stop, painter)
    with _output(out) as file:
        for place, number, sample in samples:
            line = {**prompts[place].extra, "prompt": prompts[place].text, "sample": number, **sample}
            file.write(_block(line) if file.isatty() else json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            written, tokens = written + 1, tokens + sample["tokens"]
    speed = tokens / (time.perf_counter() - started)
    where = "" if out is None else f" in {out}"
    if painter is not None:
        print(painter.legend(colours(sys.stderr)), file=sys.stderr)
    print(f"{written} samples{where}, {tokens} tokens, {speed:.1f} tokens/s", file=sys.stderr)


def _ids(session: Session, prompt: Prompt, wanted: int, truncate: bool) -> list[int]:
    try:
        return session.prompt_ids(prompt.text, wanted, truncate)
    except UsageError as error:
        raise UsageError(f"{prompt.origin}: {error}") from error


@contextlib.contextmanager
def _output(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:  # while it is written, too: a disk can be full
        raise MoeLmError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def _block(line: Mapping[str, Any]) -> str:
    return f"--- {line['prompt']!r}, sample {line['sample']}, {line['finish']}\n{line['text']}\n"


def _draws(
    session: Session,
    prompts: Sequence[list[int]],
    num: int,
    settings: Settings,
    stop: Sequence[str],
    painter: Painter | None,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Prompt, number and values of every sample, in this order, while they are written side by side."""
    slots = min(SLOTS, len(prompts) * num)
    decoder = session.decoder(slots, session.capacity_for(prompts, settings.max_new_tokens))
    drafts = []
    for place in range(len(prompts) * num):
        seed = (settings.seed + place) % (1 << 32)
        decoder.add(prompts[place // num], dataclasses.replace(settings, seed=seed), session.tokenizer.stop_ids)
        drafts.append(_Draft(session, dataclasses.replace(settings, seed=seed), stop, painter))
    shown = 0
    while decoder.busy:
        for step in decoder.step():
            draft = drafts[step.request]
            draft.take(step)
            if draft.finish and not step.finish:
                decoder.cancel(step.request)
        while shown < len(drafts) and drafts[shown].finish:
            yield shown // num, shown % num, drafts[shown].sample()
            shown += 1


class _Draft:
    """A sample that is being written."""

    def __init__(self, session: Session, settings: Settings, stop: Sequence[str], painter: Painter | None) -> None:
        self.session, self.settings, self.painter = session, settings, painter
        self.writer = Writer(session.tokenizer.decode, stop)
        self.text, self.finish = "", ""
        self.steps: list[Step] = []

    def take(self, step: Step) -> None:
        self.finish = step.finish or ""
        if step.token is not None:
            self.steps.append(step)
            if self.painter is not None:
                self.painter.see(step)
            self._write(self.writer.push(step.token))
        if self.writer.stopped:
            self.finish = "stop"
        elif self.finish:
            self._write(self.writer.end())

    def sample(self) -> dict[str, Any]:
        values = {"text": self.text, "finish": self.finish, "tokens": len(self.steps), "seed": self.settings.seed}
        if self.settings.logprobs is not None:
            values["logprobs"] = [self._probable(step) for step in self.steps]
        if self.settings.routing:
            values["experts"] = by_layer(self.session.model.config, self.steps)
        return values

    def _write(self, piece: str) -> None:
        self.text += piece if self.painter is None else self.painter.paint(piece)

    def _probable(self, step: Step) -> dict[str, Any]:
        def named(token: int, logprob: float | None) -> dict[str, Any]:
            return {
                "id": token,
                "token": self.session.tokenizer.decode([token], skip_special=False),
                "logprob": logprob,
            }

        assert step.token is not None
        return named(step.token, step.logprob) | {"top": [named(*pair) for pair in step.alternatives]}


def _beams(
    session: Session, prompts: Sequence[list[int]], settings: BeamSettings, stop: Sequence[str]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Prompt, number and values of the best texts of each prompt, the best first."""
    decode = session.tokenizer.decode

    def ends(ids: Sequence[int]) -> bool:
        text = decode(list(ids))
        return any(item in text for item in stop)

    Writer(decode, stop)  # an empty stop string is refused before the search
    stop_ids, vocab_size = session.tokenizer.stop_ids, session.tokenizer.vocab_size
    for place, prompt in enumerate(prompts):
        for number, beam in enumerate(search(session.model, prompt, settings, stop_ids, vocab_size, ends)):
            text = "".join(Completion(beam.ids, decode, stop))
            yield place, number, {"text": text, "finish": beam.finish, "tokens": len(beam.ids), "score": beam.score}
