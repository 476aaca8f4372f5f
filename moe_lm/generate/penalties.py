"""What a text so far, and a wish beside it, do to the logits of its next token.

Shapes: R rows, V vocabulary. Logits of -inf are tokens that are never chosen; ids of V and above are passed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import UsageError


class Text(NamedTuple):
    """The ids of a row so far, of which the first `prompt` were given, and what may not come next."""

    ids: Sequence[int]
    prompt: int = 0
    forbidden: Collection[int] = ()


@dataclass(frozen=True)
class Penalties:
    """Bias, then the penalties for tokens that are there already, n-grams and what is forbidden, each where it is set.

    repetition: logits of tokens of the text, prompt included, are divided by this when positive and multiplied when
    negative (CTRL, arXiv 1909.05858, section 4.1); above 1 against repetition.
    presence, frequency: taken from the logits of tokens that were written, once and for every time; the prompt does not
    count. Both as in OpenAI's interface.
    no_repeat_ngram: no n tokens in a row come twice, prompt included (arXiv 1705.04304, section 2.5).
    logit_bias: pairs of id and what is added to its logit; -inf is never.
    Raises UsageError for values without a meaning.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    no_repeat_ngram: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.repetition) and self.repetition > 0):
            raise UsageError(f"repetition_penalty={self.repetition} is not a finite number above 0; 1 is none")
        for name, value in (("presence", self.presence), ("frequency", self.frequency)):
            if not math.isfinite(value):
                raise UsageError(f"{name}_penalty={value} is not a finite number; 0 is none")
        if self.no_repeat_ngram is not None and self.no_repeat_ngram < 1:
            raise UsageError(f"no_repeat_ngram={self.no_repeat_ngram} is no length; give at least 1")
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise UsageError(f"logit_bias {token}={bias} is not an id with a number below infinity; correct it")
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise UsageError(f"logit_bias={self.logit_bias} names an id twice; give each once")

    def check_ids(self, vocab_size: int) -> None:
        """Raise UsageError for a bias of a token that is not there."""
        for token, bias in self.logit_bias:
            if token >= vocab_size:
                raise UsageError(f"logit_bias {token}={bias} names no token; the ids end at {vocab_size - 1}")

    def __bool__(self) -> bool:
        return self != NO_PENALTIES

    def __call__(self, logits_RV: Tensor, texts: Sequence[Text]) -> Tensor:
        """The logits of every row after its text, in new memory. A row can be left without any token."""
        logits_RV = with_bias(logits_RV, self.logit_bias)
        for row_V, text in zip(logits_RV, texts, strict=True):
            if self.repetition != 1:
                penalise_repetition(row_V, text.ids, self.repetition)
            if self.presence or self.frequency:
                penalise_counts(row_V, text.ids[text.prompt :], self.presence, self.frequency)
            if self.no_repeat_ngram is not None:
                row_V[_tokens(row_V, repeating(text.ids, self.no_repeat_ngram))] = -math.inf
            row_V[_tokens(row_V, text.forbidden)] = -math.inf
        return logits_RV


NO_PENALTIES = Penalties()


def with_bias(logits_RV: Tensor, bias: Iterable[tuple[int, float]]) -> Tensor:
    """A copy of the logits with each pair's number added to its id's."""
    logits_RV = logits_RV.clone()
    for token, value in bias:
        if token < logits_RV.shape[-1]:
            logits_RV[:, token] += value
    return logits_RV


def penalise_repetition(logits_V: Tensor, ids: Sequence[int], penalty: float) -> None:
    """Change in place the logits of every id that is there."""
    seen = _tokens(logits_V, ids)
    logits_V[seen] = torch.where(logits_V[seen] < 0, logits_V[seen] * penalty, logits_V[seen] / penalty)


def penalise_counts(logits_V: Tensor, ids: Sequence[int], presence: float, frequency: float) -> None:
    """Take `presence + frequency * count`, in place, from the logits of every id that is there."""
    counts = Counter(ids)
    seen = _tokens(logits_V, counts)
    times = torch.tensor([counts[token] for token in seen.tolist()], dtype=logits_V.dtype, device=logits_V.device)
    logits_V[seen] -= presence + frequency * times


def repeating(ids: Sequence[int], size: int) -> set[int]:
    """The tokens that would end, after `ids`, a run of `size` tokens that is there already."""
    start = len(ids) - size + 1
    if start < 0:
        return set()
    last = list(ids[start:])
    return {ids[place + size - 1] for place in range(start) if list(ids[place : place + size - 1]) == last}


def _tokens(logits_V: Tensor, ids: Iterable[int]) -> Tensor:
    """Each id of the vocabulary once, as an index."""
    return torch.tensor(sorted({token for token in ids if token < len(logits_V)}), dtype=torch.long).to(logits_V.device)
