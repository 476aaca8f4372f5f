"""Token ids in, token ids out: every step adds a token to each row that is being written.

A row's tokens depend only on its prompt, its settings and its seed, not on the rows beside it.
Shapes: R rows that are being written, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.config.generation import SEEDS, GenerationConfig, SampleConfig
from moe_lm.generate.compiled import CompiledStep
from moe_lm.generate.forward import Ahead, cache_for, capacity_for, check_prompt, experts_by_row, extend, prefill
from moe_lm.generate.penalties import Text, check_ids
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.transformer import LanguageModel

SLOTS = 32  # rows that are written at a time
PREFILL_TOKENS = 2048  # of prompts, in one step


@dataclass(frozen=True)
class Settings:
    """How long to go on and how tokens are chosen; row i of a batch draws with `seed + i`.

    Before `min_new_tokens` no stop token is chosen. `logprobs` asks for the log-probability of every token and of this
    many likeliest ones beside it, as the model gives them: before penalties, temperature and the rest.
    `routing` asks for the experts that predicted every token.
    """

    max_new_tokens: int = 200
    sampling: Sampling = GREEDY
    seed: int = 0
    min_new_tokens: int = 0
    logprobs: int | None = None
    routing: bool = False

    @classmethod
    def of(cls, config: GenerationConfig) -> Settings:
        """The settings that a command line asks for; without a seed, with a random one."""
        seed = secrets.randbelow(SEEDS) if config.seed is None else config.seed
        sampling = Sampling.of(config)
        if not isinstance(config, SampleConfig):
            return cls(config.max_new_tokens, sampling, seed, config.min_new_tokens)
        routing = config.show_routing is not None
        return cls(config.max_new_tokens, sampling, seed, config.min_new_tokens, config.logprobs, routing)

    def of_row(self, row: int) -> Settings:
        """The settings of a batch's row, which draws with `seed + row`."""
        return dataclasses.replace(self, seed=(self.seed + row) % (1 << 32))


class Step(NamedTuple):
    """The token that a step added to a request, and whether the text has ended.

    `token` is None when the text ended without another one. `finish` is "stop" before a stop token, "length" when
    there is no room for more, "exhausted" when the penalties leave no token, None while the text goes on.
    `alternatives` are pairs of token and log-probability, the likeliest first. `experts` predicted `token`: they took
    the position before it, in each MoE layer, the one with the largest weight first.
    """

    request: int
    token: int | None
    finish: str | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    experts: tuple[tuple[int, ...], ...] | None = None


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    slots: int = SLOTS,
) -> list[list[int]]:
    """The continuation of every prompt, written at most `slots` rows at a time.

    A row ends before a token of `stop_ids`, after `max_new_tokens`, or when the model has no position left.
    Only ids below `vocab_size` are chosen: a model may have more than its tokenizer has tokens for. Raises, before
    the first token, UsageError for a prompt that is empty or too long.
    """
    capacity = capacity_for(model.config, map(len, prompts), settings.max_new_tokens)
    decoder = Decoder(model, min(slots, len(prompts)), capacity, vocab_size)
    for row, prompt in enumerate(prompts):
        decoder.add(prompt, settings.of_row(row), stop_ids)
    texts: list[list[int]] = [[] for _ in prompts]
    for step in decoder.run():
        if step.token is not None:
            texts[step.request].append(step.token)
    return texts


class Decoder:
    """Writes many texts at once into one cache whose `slots` rows are refilled as texts end.

    `add` queues a prompt. `step` adds a token to every row and takes in up to `prefill_tokens` tokens of the waiting
    prompts, first come, first served, a long prompt piece by piece. `cancel` drops a request wherever it is. The cache
    is made once, for `capacity` positions a row.

    The rows that are being written come first in the cache, so that a step reads them without a copy: a row that ends
    is overwritten by the last one. A prompt that is taken in piece by piece grows in the cache's last row.

    `compiled` steps are for GPUs; the first ones wait for `torch.compile`, and CompiledStep says what it raises.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        capacity: int,
        vocab_size: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        compiled: bool = False,
    ) -> None:
        self.model, self.vocab_size, self.prefill_tokens = model, vocab_size, prefill_tokens
        self.slots, self.capacity = slots, min(capacity, model.config.max_position_embeddings)
        self.cache = cache_for(model, self.slots, self.capacity)
        self._compiled = CompiledStep(model) if compiled else None
        self._rows: list[_Request] = []  # being written, in the order of the cache
        self._waiting: deque[_Request] = deque()
        self._growing: _Request | None = None
        self._requests = 0

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting or self._growing)

    def add(self, prompt: Sequence[int], settings: Settings, stop_ids: Collection[int] = ()) -> int:
        """Queue a prompt. Returns the request's number in `step` and `cancel`: 0, 1, 2 and so on.

        Raises UsageError for a prompt that is empty or too long, or a bias of a token that does not exist.
        """
        check_prompt(self.model.config, prompt, self.capacity)
        check_ids(settings.sampling, self.vocab_size or self.model.config.vocab_size)
        left = min(settings.max_new_tokens, self.capacity - len(prompt) + 1)
        row = _Request(self._requests, list(prompt), len(prompt), settings, frozenset(stop_ids), left)
        self._waiting.append(row)
        self._requests += 1
        return row.request

    @torch.inference_mode()
    def cancel(self, request: int) -> bool:
        """Forget a request. Returns False when there is no such request (any more)."""
        if self._growing is not None and self._growing.request == request:
            self._growing = None
            return True
        for row in self._waiting:
            if row.request == request:
                self._waiting.remove(row)
                return True
        for place, row in enumerate(self._rows):
            if row.request == request:
                self._free(place)
                return True
        return False

    def clear(self) -> None:
        """Forget every request and empty the cache: a step that failed may leave NaN there, and 0 times NaN is NaN."""
        self._rows, self._growing = [], None
        self._waiting.clear()
        del self.cache  # first, so that there is room for the next one
        self.cache = cache_for(self.model, self.slots, self.capacity)

    def run(self) -> Iterator[Step]:
        """Step until every request has ended."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Add a token to every row. Returns at most one Step a request. Raises MoeLmError for broken logits."""
        ahead = []
        if self._rows:
            ahead.append(self._extend())
        ahead += self._take_in()
        if not ahead:
            return []
        logits_RV = ahead[0].logits if len(ahead) == 1 else torch.cat([part.logits for part in ahead])
        logits_RV = logits_RV[:, : self.vocab_size]
        tokens = self._choose(logits_RV)
        experts = experts_by_row(ahead) if any(row.settings.routing for row in self._rows) else []
        steps, ended = [], []
        for place, (row, token) in enumerate(zip(self._rows, tokens, strict=True)):
            step = row.write(token)
            if row.settings.logprobs is not None and step.token is not None:
                step = with_log_probabilities(step, logits_RV[place], row.settings.logprobs)
            if row.settings.routing and step.token is not None:
                step = step._replace(experts=experts[place])
            steps.append(step)
            if step.finish is not None:
                ended.append(place)
        for place in reversed(ended):
            self._free(place)
        return steps

    def _extend(self) -> Ahead:
        if self._compiled is None:
            return extend(self.model, self.cache.view(0, len(self._rows)), [row.ids[-1:] for row in self._rows])
        logits, routings = self._compiled(self.cache, [row.ids[-1] for row in self._rows])
        return Ahead(logits, routings, slice(0, len(self._rows)))

    def _free(self, place: int) -> None:
        last = self._rows.pop()
        if place < len(self._rows):
            self.cache.move_row(len(self._rows), place)
            self._rows[place] = last

    def _take_in(self) -> list[Ahead]:
        """Take waiting prompts, or a piece of one, into the cache. Those that are whole become rows.

        No prompt overtakes one that grows: it has the budget of every step until it is whole.
        """
        free = self.slots - len(self._rows)
        if self._growing is None and free and self._waiting and self._waiting[0].prompt > self.prefill_tokens:
            self._growing = self._waiting.popleft()
            self.cache.lengths[-1] = 0
        if self._growing is not None:
            return self._grow(self._growing)
        whole: list[_Request] = []
        budget = self.prefill_tokens
        while self._waiting and len(whole) < free and self._waiting[0].prompt <= budget:
            whole.append(self._waiting.popleft())
            budget -= whole[-1].prompt
        if not whole:
            return []
        part = self.cache.view(len(self._rows), len(self._rows) + len(whole))
        part.lengths.zero_()
        self._rows += whole
        return [prefill(self.model, [row.ids for row in whole], part)]

    def _grow(self, row: _Request) -> list[Ahead]:
        last = self.slots - 1
        part = self.cache.view(last, last + 1)
        done = int(part.lengths)
        piece = row.ids[done : done + self.prefill_tokens]
        ahead = extend(self.model, part, [piece]) if done else prefill(self.model, [piece], part)
        if done + len(piece) < row.prompt:
            return []
        self.cache.move_row(last, len(self._rows))
        self._rows.append(row)
        self._growing = None
        return [ahead]

    def _choose(self, logits_RV: Tensor) -> list[int]:
        """The next token of each row by its own strategy; -1 where no token is left."""
        by_strategy: dict[Sampling, list[int]] = {}
        for place, row in enumerate(self._rows):
            by_strategy.setdefault(row.settings.sampling, []).append(place)
        chosen = [-1] * len(self._rows)
        for sampling, places in by_strategy.items():
            rows = [self._rows[place] for place in places]
            part_RV = logits_RV if len(places) == len(logits_RV) else logits_RV[places]
            tokens = sampling(part_RV, [row.generator for row in rows], [row.text() for row in rows])
            for place, token in zip(places, tokens.tolist(), strict=True):
                chosen[place] = token
        return chosen


def with_log_probabilities(step: Step, logits_V: Tensor, alternatives: int) -> Step:
    """The step with the log-probabilities of its token and of the likeliest ones."""
    log_p = logits_V.float().log_softmax(-1)
    best = log_p.topk(min(alternatives, len(log_p)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return step._replace(logprob=float(log_p[step.token]), alternatives=pairs)


@dataclass
class _Request:
    """A prompt and the tokens that were written after it."""

    request: int
    ids: list[int]
    prompt: int
    settings: Settings
    stop_ids: frozenset[int]
    room: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def text(self) -> Text:
        """The view of its strategy; the stop tokens are forbidden until the text is long enough."""
        short = len(self.ids) - self.prompt < self.settings.min_new_tokens
        return Text(self.ids, self.prompt, self.stop_ids if short else ())

    def write(self, token: int) -> Step:
        if token < 0:
            return Step(self.request, None, "exhausted")
        if token in self.stop_ids:
            return Step(self.request, None, "stop")
        self.ids.append(token)
        self.room -= 1
        return Step(self.request, token, None if self.room else "length")
