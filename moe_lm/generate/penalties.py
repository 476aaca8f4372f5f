"""The effect of the text so far, and of a bias, on the logits of the next token.

Shapes: R rows, V vocabulary. Logits of -inf are tokens that are never chosen; ids of V and above are passed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.config.generation import SamplingConfig


class Text(NamedTuple):
    """The ids of a row so far, of which the first `prompt` were given, and the tokens that may not come next."""

    ids: Sequence[int]
    prompt: int = 0
    forbidden: Collection[int] = ()


def penalises(config: SamplingConfig) -> bool:
    """Whether these settings change logits before the temperature does."""
    counted = config.presence_penalty or config.frequency_penalty
    return bool(counted or config.repetition_penalty != 1 or config.no_repeat_ngram or config.logit_bias)


def penalised(logits_RV: Tensor, config: SamplingConfig, texts: Sequence[Text]) -> Tensor:
    """The logits of every row after its text, in new memory. A row can be left without any token.

    The bias comes first, then for each row `repetition_penalty`, `presence_penalty` and `frequency_penalty`,
    `no_repeat_ngram`, and the tokens that its text forbids.
    """
    logits_RV = with_bias(logits_RV, config.logit_bias)
    presence, frequency = config.presence_penalty, config.frequency_penalty
    for row_V, text in zip(logits_RV, texts, strict=True):
        if config.repetition_penalty != 1:
            penalise_repetition(row_V, text.ids, config.repetition_penalty)
        if presence or frequency:
            penalise_counts(row_V, text.ids[text.prompt :], presence, frequency)
        if config.no_repeat_ngram is not None:
            row_V[_tokens(row_V, repeating(text.ids, config.no_repeat_ngram))] = -math.inf
        row_V[_tokens(row_V, text.forbidden)] = -math.inf
    return logits_RV


def check_ids(config: SamplingConfig, vocab_size: int) -> None:
    """Raise UsageError for a bias of a token that does not exist."""
    for token, bias in config.logit_bias:
        if token >= vocab_size:
            raise UsageError(f"logit_bias {token}={bias} names no token; the ids end at {vocab_size - 1}")


def with_bias(logits_RV: Tensor, bias: Iterable[tuple[int, float]]) -> Tensor:
    """A copy of the logits with each pair's number added to its id's."""
    logits_RV = logits_RV.clone()
    for token, value in bias:
        if token < logits_RV.shape[-1]:
            logits_RV[:, token] += value
    return logits_RV


def penalise_repetition(logits_V: Tensor, ids: Sequence[int], penalty: float) -> None:
    """Make every id of `ids` less likely, in place."""
    seen = _tokens(logits_V, ids)
    logits_V[seen] = torch.where(logits_V[seen] < 0, logits_V[seen] * penalty, logits_V[seen] / penalty)


def penalise_counts(logits_V: Tensor, ids: Sequence[int], presence: float, frequency: float) -> None:
    """Subtract `presence + frequency * count`, in place, from the logit of every id of `ids`."""
    counts = Counter(ids)
    seen = _tokens(logits_V, counts)
    times = torch.tensor([counts[token] for token in seen.tolist()], dtype=logits_V.dtype, device=logits_V.device)
    logits_V[seen] -= presence + frequency * times


def repeating(ids: Sequence[int], size: int) -> set[int]:
    """The tokens that would repeat, after `ids`, a sequence of `size` tokens."""
    start = len(ids) - size + 1
    if start < 0:
        return set()
    last = list(ids[start:])
    return {ids[place + size - 1] for place in range(start) if list(ids[place : place + size - 1]) == last}


def _tokens(logits_V: Tensor, ids: Iterable[int]) -> Tensor:
    """The ids below V, each once, as an index."""
    return torch.tensor(sorted({token for token in ids if token < len(logits_V)}), dtype=torch.long).to(logits_V.device)
