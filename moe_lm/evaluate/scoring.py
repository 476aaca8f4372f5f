"""How likely a model finds continuations, and what it writes: the two questions that tasks ask, in token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.data.batches import IGNORE
from moe_lm.data.packing import Example, pack_examples
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.model.attention import PackedAttention, segment_positions
from moe_lm.objective.training_loss import Predictions
from moe_lm.tokenizer.tokenizer import Tokenizer

TOKENS_AT_ONCE = 1 << 14

Tell = Callable[[int, int], None]  # requests done, and in all


class Request(NamedTuple):
    """A continuation to score, after its context, which begins with the tokenizer's bos or is one token at least."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether it is what greedy decoding writes."""

    log_likelihood: float
    is_greedy: bool


class Scorer(Protocol):
    """A model that scores and writes: a loaded run, or one in training."""

    tokenizer: Tokenizer
    max_length: int  # tokens that the model reads at once

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """The score of every request; a context that is too long loses its beginning."""
        ...

    def write(self, prompts: Sequence[Sequence[int]], settings: Settings, stop: Sequence[str]) -> list[str]:
        """The text after each prompt, which ends before a stop string or a token that ends a text."""
        ...


class SessionScorer:
    """A loaded run. `batch_size` requests are computed at once; None: as many as fit into TOKENS_AT_ONCE."""

    def __init__(
        self,
        session: Session,
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        tell: Tell = lambda done, total: None,
    ) -> None:
        self.tokenizer = session.tokenizer
        self.max_length = session.model.config.max_position_embeddings
        self._session, self._batch_size, self._dtype, self._tell = session, batch_size, dtype, tell

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        examples = [example(request, self.max_length) for request in requests]
        scores: list[Score] = [Score(0.0, True)] * len(requests)
        done = 0
        for numbers in self._groups(examples):
            for number, found in zip(numbers, self._scores([examples[n] for n in numbers]), strict=True):
                scores[number] = found
            self._tell(done := done + len(numbers), len(requests))
        return scores

    def write(self, prompts: Sequence[Sequence[int]], settings: Settings, stop: Sequence[str]) -> list[str]:
        texts, done = [""] * len(prompts), 0
        for delta in self._session.write(prompts, settings, stop):
            texts[delta.row] += delta.text
            if delta.finish is not None:
                self._tell(done := done + 1, len(prompts))
        return texts

    def _groups(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """The numbers of the examples that are computed together: the longest first, so that memory fails early."""
        group: list[int] = []
        tokens = 0
        for number in sorted(range(len(examples)), key=lambda number: -len(examples[number].input_ids)):
            size = len(examples[number].input_ids)
            full = tokens + size > TOKENS_AT_ONCE if self._batch_size is None else len(group) == self._batch_size
            if group and full:
                yield group
                group, tokens = [], 0
            group.append(number)
            tokens += size
        if group:
            yield group

    def _scores(self, examples: Sequence[Example]) -> list[Score]:
        """The scores of examples that are computed in one packed row."""
        model = self._session.model
        batch, numbers = pack_examples([examples], sum(len(item.input_ids) for item in examples), pad_id=0)
        batch = batch.to(model.device)
        attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
        scored = batch.targets != IGNORE
        targets_T = batch.targets[scored]
        with torch.autocast(model.device.type, self._dtype, enabled=self._dtype != torch.float32):
            positions_1T = segment_positions(batch.cu_seqlens, batch.input_ids.shape)
            hidden_1TD, _ = model.model(batch.input_ids, positions_1T, attend)
            predictions = Predictions(model.lm_head, hidden_1TD[scored][None])
            nll_T, hits_T = predictions.nll(targets_T[None])[0], predictions.likeliest()[0] == targets_T
        return scores_of(nll_T, hits_T, torch.from_numpy(numbers)[scored.cpu()], len(examples))


def example(request: Request, max_length: int) -> Example:
    """The tokens that a model reads to score a request, and its targets; what does not fit is cut from the left.

    Raises UsageError for a continuation that is longer than `max_length`, or an empty one.
    """
    size = len(request.continuation)
    if not 0 < size <= max_length:
        raise UsageError(
            f"a task asks for the likelihood of {size} tokens; expected 1 to {max_length}, as many as the model reads "
            "at once"
        )
    ids = np.array([*request.context, *request.continuation], np.int64)[-(max_length + 1) :]
    targets = ids[1:].copy()
    targets[:-size] = IGNORE
    return Example(ids[:-1], targets)


def scores_of(nll_T: Tensor, hits_T: Tensor, numbers_T: Tensor, count: int) -> list[Score]:
    """The scores of `count` examples: of each scored token its loss, whether it is the likeliest, and its example."""
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers_T, nll_T.cpu().double())
    misses = torch.zeros(count, dtype=torch.int64).index_add_(0, numbers_T, (~hits_T).cpu().long())
    return [Score(-nll, missed == 0) for nll, missed in zip(sums.tolist(), misses.tolist(), strict=True)]
