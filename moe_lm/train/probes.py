"""What a run asks its model at every evaluation: answers to tasks, and texts that continue prompts.

Every rank asks the same, in the run's own layout and in batches of the shape of training: expert-parallel and ZeRO
ranks compute together, and nothing is compiled anew. There is no cache, so a text costs a forward pass a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.common.terminal import printable
from moe_lm.config.run import FinetuneConfig, RunConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.packing import Example, pack_examples, pack_rows
from moe_lm.engine.engine import Engine
from moe_lm.evaluate.scoring import Request, Score, example
from moe_lm.evaluate.tasks import Tasks
from moe_lm.generate.decode import Settings
from moe_lm.generate.strategies import Sampling
from moe_lm.objective.training_loss import Objective, Predictions
from moe_lm.objective.training_loss import Score as LossScore
from moe_lm.parallel.process_group import all_reduce_sum
from moe_lm.tokenizer.tokenizer import Tokenizer

SAMPLING = Sampling(temperature=0.8)
BLOCK = 128  # tokens: rows of samples are as long as a multiple of it, unless each length is compiled anew


class Event(NamedTuple):
    """What the log takes of a probe."""

    kind: str
    text: str
    fields: dict[str, Any]


class Stopped(Exception):  # noqa: N818
    """A signal came between two forward passes."""


@dataclass(frozen=True)
class Probes:
    """The tasks and prompts of a run."""

    config: RunConfig
    tokenizer: Tokenizer
    tasks: Tasks | None

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer) -> Probes | None:
        """None if the config asks for none. Raises UsageError for tasks that cannot be had."""
        log = config.log
        if not (log.eval_tasks or log.sample_prompts):
            return None
        tasks = Tasks(log.eval_tasks, log.task_data) if log.eval_tasks else None
        if tasks is not None and tasks.writing:
            raise UsageError(
                f"log.eval_tasks: {', '.join(tasks.writing)} asks the model to write, which takes long in training; "
                "take it out, and use moe-lm eval --tasks on a checkpoint"
            )
        return cls(config, tokenizer, tasks)

    def ask(self, engine: Engine, step: int, heed: Callable[[], bool]) -> list[Event] | None:
        """What the model answers after `step`. None if `heed`, called before every forward pass, says that it ends."""
        model = Asked(engine, self.config, self.tokenizer, heed)
        try:
            return [*self._tasks(model, step), *self._samples(model, step)]
        except Stopped:
            return None

    def _tasks(self, model: Asked, step: int) -> Iterator[Event]:
        if self.tasks is None:
            return
        try:
            results = self.tasks.run(model, self.config.log.eval_tasks_limit)
        except Exception as error:  # lm-eval's tasks have errors of their own; the ranks ask alike, and so all go on
            if error is model.error:
                raise
            reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
            text = f"warning: the tasks could not be answered after step {step}: {reason}; training goes on"
            yield Event("failed_tasks", text, {"reason": reason})
            return
        said = ", ".join(f"{result.name} {result}" for result in results)
        figures = {result.name: result.figures() for result in results}
        if model.shortened:
            said += f" (of {model.shortened} answers longer than a row, its last {model.max_length} tokens)"
        yield Event("tasks", f"tasks after step {step}: {said}", {"tasks": figures})

    def _samples(self, model: Asked, step: int) -> Iterator[Event]:
        log = self.config.log
        prompts = [self._ids(prompt) for prompt in log.sample_prompts]
        texts = model.write(prompts, Settings(log.sample_tokens, SAMPLING), ())
        for prompt, text in zip(log.sample_prompts, texts, strict=True):
            said = f"sample after step {step}: {_quoted(prompt)} -> {_quoted(text)}"
            yield Event("sample", said, {"prompt": prompt, "text": text})

    def _ids(self, prompt: str) -> list[int]:
        """The prompt begins a document; in fine-tuning it is a user's message."""
        if isinstance(self.config, FinetuneConfig) and self.tokenizer.has_chat_template:
            return self.tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)[0]
        return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]


class Asked:
    """The model of an engine as a scorer (evaluate/scoring.py). Every rank asks it the same."""

    def __init__(self, engine: Engine, config: RunConfig, tokenizer: Tokenizer, heed: Callable[[], bool]) -> None:
        self.tokenizer, self.max_length = tokenizer, config.row_length
        self._engine, self._heed, self._compiled = engine, heed, config.train.compile
        self._rows = config.train.rows_at_once(engine.topology.row_groups)
        self.error: Exception | None = None  # the engine's own, or that a signal came
        self.shortened = 0  # continuations that are longer than a row

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Of a continuation that is longer than a row, only its end is scored."""
        self.shortened += sum(len(request.continuation) > self.max_length for request in requests)
        examples = [example(_end(request, self.max_length), self.max_length) for request in requests]
        objective = _ScoreExamples(len(examples))
        batches = _packed(examples, self._rows, self.max_length, self.tokenizer.pad_id)
        misses, nll = self._sum(batches, objective).tolist()
        return [Score(-loss, missed == 0) for loss, missed in zip(nll[:-1], misses[:-1], strict=True)]

    def write(self, prompts: Sequence[Sequence[int]], settings: Settings, stop: Sequence[str]) -> list[str]:
        """A long text loses its beginning where its row is full; a stop string does not end it early."""
        texts = [list(prompt) for prompt in prompts]
        generators = [torch.Generator().manual_seed(settings.of_row(row).seed) for row in range(len(texts))]
        rows, length = self._shape_for(max(map(len, texts), default=0) + settings.max_new_tokens)
        writing = list(range(len(texts)))
        for _ in range(settings.max_new_tokens):
            if not writing:
                break
            ends = [_to_last(texts[text], place, length) for place, text in enumerate(writing)]
            objective = _LastLogits(len(writing), self._engine.model.config.vocab_size)
            [logits_RV] = self._sum(_packed(ends, rows, length, self.tokenizer.pad_id), objective)
            chosen = settings.sampling(
                logits_RV[:, : self.tokenizer.vocab_size].cpu(), [generators[text] for text in writing]
            )
            for text, token in zip(writing, chosen.tolist(), strict=True):
                texts[text].append(token)
            writing = [text for text in writing if texts[text][-1] not in self.tokenizer.stop_ids]
        return [self.tokenizer.decode(ids[len(prompt) :]) for ids, prompt in zip(texts, prompts, strict=True)]

    def _shape_for(self, tokens: int) -> tuple[int, int]:
        """Rows and their length in a batch of texts."""
        if self._compiled:
            return self._rows, self.max_length
        block = BLOCK * self._engine.topology.sequence_parallel_size
        return 1, min(self.max_length, -(-tokens // block) * block)

    def _sum(self, batches: Sequence[Batch], objective: _Probe) -> Tensor:
        """The values of an objective over all batches, which the ranks share, on every rank."""
        try:
            return self._sum_of_ranks(batches, objective)
        except Exception as error:
            self.error = error
            raise

    def _sum_of_ranks(self, batches: Sequence[Batch], objective: _Probe) -> Tensor:
        at_once = self._engine.topology.row_groups
        total = torch.zeros(objective.shape, device=self._engine.device)
        with _instead(self._engine, objective):
            for start in range(0, len(batches), at_once):
                if self._heed():
                    raise Stopped
                for share in self._engine.forward_shares(batches[start : start + at_once]):
                    if share.is_own:
                        total += share.parts.values["probe"]
        return all_reduce_sum(total).cpu()


class _Probe:
    """An objective that only looks: `shape` is that of its one value."""

    shape: tuple[int, ...]

    def units(self, batch: Batch) -> int:
        return 0

    def score(self, predictions: Predictions, batch: Batch) -> LossScore:
        nothing = torch.zeros((), device=batch.input_ids.device)
        return LossScore(nothing, {}, {"probe": self.look(predictions, batch)})

    def look(self, predictions: Predictions, batch: Batch) -> Tensor:
        raise AssertionError("a probe looks at something")


class _ScoreExamples(_Probe):
    """For each example the targets that are not the likeliest token, and the loss in nats: `[2, examples + 1]`."""

    def __init__(self, examples: int) -> None:
        self.shape = (2, examples + 1)  # the last is padding

    def look(self, predictions: Predictions, batch: Batch) -> Tensor:
        assert batch.answers is not None
        missed = (batch.targets != IGNORE) & (predictions.likeliest() != batch.targets)
        found = torch.stack([missed.float(), predictions.nll(batch.targets)]).flatten(1)
        return found.new_zeros(self.shape).index_add_(1, batch.answers.flatten(), found)


class _LastLogits(_Probe):
    """The logits after each text, whose number is the target of its last token: `[1, texts, V]`."""

    def __init__(self, texts: int, vocabulary: int) -> None:
        self.shape = (1, texts, vocabulary)

    def look(self, predictions: Predictions, batch: Batch) -> Tensor:
        last = batch.targets != IGNORE
        found = torch.zeros(self.shape, device=last.device)
        found[0, batch.targets[last]] = predictions.logits(last)
        return found


@contextmanager
def _instead(engine: Engine, objective: Objective) -> Iterator[None]:
    """Let the engine compute another objective for a while."""
    before, engine.loss.objective = engine.loss.objective, objective
    try:
        yield
    finally:
        engine.loss.objective = before


def _packed(examples: Sequence[Example], rows: int, length: int, pad_id: int) -> list[Batch]:
    """Batches of one shape with every example, whose number is in `answers`."""
    packed = pack_rows([len(item.input_ids) for item in examples], length)
    batches = []
    for first in range(0, len(packed), rows):
        some = packed[first : first + rows] + [[]] * (first + rows - len(packed))
        batch, places = pack_examples([[examples[item] for item in row] for row in some], length, pad_id)
        numbers = np.array([*(item for row in some for item in row), len(examples)])
        batches.append(replace(batch, answers=torch.from_numpy(numbers[places])))
    return batches


def _end(request: Request, length: int) -> Request:
    """The request for the last `length` tokens of its continuation."""
    whole = [*request.context, *request.continuation]
    size = min(length, len(request.continuation))
    return Request(whole[: len(whole) - size], whole[len(whole) - size :])


def _to_last(ids: Sequence[int], number: int, length: int) -> Example:
    """A text to go on with, whose `number` is the target of its last token."""
    kept = np.array(ids[-length:], np.int64)
    targets = np.full_like(kept, IGNORE)
    targets[-1] = number
    return Example(kept, targets)


def _quoted(text: str) -> str:
    """A text on one line."""
    return printable(json.dumps(text, ensure_ascii=False))
