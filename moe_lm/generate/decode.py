"""Token ids in, token ids out: prompts fill a KV cache packed, then every step adds a token to each unfinished row.

A row's tokens depend on its prompt, its settings and its seed alone, not on the rows beside it.
Shapes: R rows that are being written, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.generate.compiled import CompiledStep
from moe_lm.generate.penalties import Text
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.attention import CachedAttention, PrefillAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel

SLOTS = 32  # rows that are written at a time
PREFILL_TOKENS = 2048  # of prompts, in one step


@dataclass(frozen=True)
class Settings:
    """How long to go on and how tokens are chosen; row i of a batch draws with `seed + i`.

    Before `min_new_tokens` no stop token is chosen. `logprobs` asks for the log-probability of every token and for so
    many of the likeliest ones beside it, both as the model gives them: before penalties, temperature and the rest.
    `routing` asks for the experts behind every token.
    """

    max_new_tokens: int = 200
    sampling: Sampling = GREEDY
    seed: int = 0
    min_new_tokens: int = 0
    logprobs: int | None = None
    routing: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens} asks for no token; give at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens={self.min_new_tokens} is not between 0 and max_new_tokens={self.max_new_tokens}; "
                "change one of them"
            )
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed={self.seed} is out of range; give a number from 0 to 2**32 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs={self.logprobs} is not a number of tokens; give at least 0")

    def of_row(self, row: int) -> Settings:
        """The settings of a batch's row, which draws with `seed + row`."""
        return dataclasses.replace(self, seed=(self.seed + row) % (1 << 32))


class Step(NamedTuple):
    """What a step did to a request: the token it chose, and whether the text has ended with it.

    `token` is None when the text ended without another one. `finish` is "stop" before a stop token, "length" when
    there is no room for more, "exhausted" when the penalties leave no token, None while the text goes on.
    `alternatives` are pairs of token and log-probability, the likeliest first. `experts` are those that predicted
    `token`: of each MoE layer, in layer order, the experts that took the last position before it, the strongest first.
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
    """The continuation of every prompt; see `steps`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for step in steps(model, prompts, settings, stop_ids, vocab_size, slots):
        if step.token is not None:
            texts[step.request].append(step.token)
    return texts


def steps(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    slots: int = SLOTS,
) -> Iterator[Step]:
    """What happens to every row, step by step, of at most `slots` rows at a time; `request` is the row.

    A row ends before a token of `stop_ids`, after `max_new_tokens`, or when the model has no position left.
    Only ids below `vocab_size` are chosen: a model may have more than its tokenizer has tokens for. Raises, before
    the first token, UsageError for a prompt that is empty or too long.
    """
    if not prompts:
        return iter(())
    decoder = Decoder(
        model,
        slots=min(slots, len(prompts)),
        capacity=capacity_for(model.config, map(len, prompts), settings.max_new_tokens),
        vocab_size=vocab_size,
    )
    for row, prompt in enumerate(prompts):
        decoder.add(prompt, settings.of_row(row), stop_ids)
    return decoder.run()


def room(config: ModelConfig, prompt: Sequence[int]) -> int:
    """Tokens that can follow a prompt, the last of which needs no position; below 1 when the prompt is too long."""
    return config.max_position_embeddings - len(prompt) + 1


def check_prompt(config: ModelConfig, prompt: Sequence[int], capacity: int) -> None:
    """Raise UsageError for a prompt that is empty, has ids that the model lacks, or more tokens than `capacity`."""
    if not prompt:
        raise UsageError("a prompt has no token to start from; begin it with the tokenizer's bos")
    if len(prompt) > capacity:
        whole = capacity == config.max_position_embeddings
        limit = f"model's max_position_embeddings={capacity}" if whole else f"cache's {capacity} positions"
        raise UsageError(f"the prompt has {len(prompt)} tokens, more than the {limit}; shorten it")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise UsageError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}, but the model's vocab_size={config.vocab_size}; "
            "use the tokenizer that it was trained with"
        )


def capacity_for(config: ModelConfig, lengths: Iterator[int] | Sequence[int], new_tokens: int) -> int:
    """Positions that a cache needs for prompts of these lengths."""
    return min(config.max_position_embeddings, max(lengths, default=1) + new_tokens - 1)


@torch.inference_mode()
def cache_for(model: LanguageModel, rows: int, capacity: int) -> KVCache:
    """A cache that lies where the model's layers do."""
    layers = None if model.placement is None else model.placement.layers
    return KVCache(model.config, rows, capacity, model.device, model.lm_head.weight.dtype, layers)


class Decoder:
    """Writes many texts at once into one cache whose `slots` rows are refilled as texts end.

    `add` queues a prompt, `step` adds a token to every row and takes up to `prefill_tokens` tokens of waiting prompts
    in, first come first served, a long prompt piece by piece; `cancel` drops a request wherever it is. The cache is
    made once, for `capacity` positions a row.

    Rows that are being written are the first of the cache, so that a step reads them without a copy: a row that ends
    is overwritten by the last one. A prompt that is taken in piece by piece grows in the cache's last row.

    `compiled` steps are for GPUs (compiled.py, which says what it raises): the first ones wait for `torch.compile`.
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
        self._rows: list[_Row] = []  # being written, in the order of the cache
        self._waiting: deque[_Row] = deque()
        self._growing: _Row | None = None
        self._requests = 0

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting or self._growing)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    def add(self, prompt: Sequence[int], settings: Settings, stop_ids: Collection[int] = ()) -> int:
        """The number that names the request in `step` and `cancel`: 0, 1, 2 and so on.

        Raises UsageError for a prompt that is empty or too long, or a bias of a token that is not there.
        """
        check_prompt(self.model.config, prompt, self.capacity)
        settings.sampling.penalties.check_ids(self.vocab_size or self.model.config.vocab_size)
        left = min(settings.max_new_tokens, self.capacity - len(prompt) + 1)
        row = _Row(self._requests, list(prompt), len(prompt), settings, frozenset(stop_ids), left)
        self._waiting.append(row)
        self._requests += 1
        return row.request

    @torch.inference_mode()
    def cancel(self, request: int) -> bool:
        """Forget a request; False when it is not there (any more)."""
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
        """Forget every request, and what a step that failed has left in the cache: there 0 times NaN is NaN."""
        self._rows, self._growing = [], None
        self._waiting.clear()
        del self.cache  # first, so that there is room for the next one
        self.cache = cache_for(self.model, self.slots, self.capacity)

    def run(self) -> Iterator[Step]:
        """Step until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """One more token for every row; what happened, at most once a request. Raises MoeLmError for broken logits."""
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
        """Prompts, or a piece of one, into the cache; what follows those that are whole now, which are rows from here.

        Nothing passes a prompt that grows: it has the budget of every step until it is whole.
        """
        free = self.slots - len(self._rows)
        if self._growing is None and free and self._waiting and self._waiting[0].prompt > self.prefill_tokens:
            self._growing = self._waiting.popleft()
            self.cache.lengths[-1] = 0
        if self._growing is not None:
            return self._grow(self._growing)
        whole: list[_Row] = []
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

    def _grow(self, row: _Row) -> list[Ahead]:
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
        """A token a row, each with its own strategy; -1 where none is left."""
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
    """The step with its token's log-probability, and those of the likeliest ones."""
    log_p = logits_V.float().log_softmax(-1)
    best = log_p.topk(min(alternatives, len(log_p)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return step._replace(logprob=float(log_p[step.token]), alternatives=pairs)


@dataclass
class _Row:
    """A request on its way: its prompt and what was written after it."""

    request: int
    ids: list[int]
    prompt: int
    settings: Settings
    stop_ids: frozenset[int]
    room: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)

    def text(self) -> Text:
        """What its strategy may look at; the stop tokens are forbidden until the text is long enough."""
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


class Ahead(NamedTuple):
    """What a model says about the token after each row."""

    logits: Tensor  # [R, V]
    routings: list[Routing]  # of every MoE layer, and all tokens that were given
    last: Tensor | slice  # the row's last token among them

    def of_last(self, x: Tensor) -> Tensor:
        """What the last token of each row has, `[R, ...]`, of all that the tokens have."""
        return x[self.last.to(x.device) if isinstance(self.last, Tensor) else self.last]


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], cache: KVCache) -> Ahead:
    """Fill the empty rows of the cache with the prompts, packed."""
    lengths = [len(prompt) for prompt in prompts]
    device = cache.lengths.device
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    input_ids = torch.cat([torch.tensor(prompt) for prompt in prompts]).to(device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)
    attend = PrefillAttention(cache, lengths, ends.int())
    hidden_1TD, routings = model.model(input_ids[None], position_ids[None], attend)
    cache.lengths += ends.diff()
    last_R = ends[1:] - 1
    return Ahead(model.lm_head(hidden_1TD[0].to(device)[last_R]), routings, last_R)


def extend(model: LanguageModel, cache: KVCache, tokens: Sequence[Sequence[int]]) -> Ahead:
    """Append equally many tokens to every row of the cache."""
    input_ids_RS = torch.tensor(tokens, device=cache.lengths.device)
    new = input_ids_RS.shape[1]
    positions_RS = cache.lengths[:, None] + torch.arange(new, device=input_ids_RS.device)
    hidden_RSD, routings = model.model(input_ids_RS, positions_RS, CachedAttention(cache))
    cache.lengths += new
    return Ahead(model.lm_head(hidden_RSD[:, -1]), routings, slice(new - 1, None, new))


def experts_by_row(ahead: Sequence[Ahead]) -> list[tuple[tuple[int, ...], ...]]:
    """Of each row, of each MoE layer, the experts of the last token, the one with the largest weight first."""
    layers = []
    for layer in range(len(ahead[0].routings)):
        experts_Rk = torch.cat([part.of_last(part.routings[layer].experts) for part in ahead])
        weights_Rk = torch.cat([part.of_last(part.routings[layer].weights) for part in ahead])
        layers.append(experts_Rk.gather(-1, weights_Rk.argsort(-1, descending=True)).tolist())
    rows = range(sum(len(part.logits) for part in ahead))
    return [tuple(tuple(experts_Rk[row]) for experts_Rk in layers) for row in rows]
