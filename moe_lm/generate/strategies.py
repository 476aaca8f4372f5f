"""How the next token is chosen from logits.

Shapes: R rows, V vocabulary. Logits of -inf are tokens that are never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.errors import MoeLmError, UsageError


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, each where it is set, then a draw. Temperature 0 is greedy.

    top_k: choose among this many likeliest tokens; more than the vocabulary is the vocabulary.
    top_p: choose among the likeliest tokens that together hold this probability (arXiv 1904.09751), at least one.
    Raises UsageError for values without a meaning.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature={self.temperature} is not a finite number of at least 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k} leaves no token to choose; give at least 1")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is no probability; give a number from 0 to 1")

    def __call__(self, logits_RV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The chosen token of each row, `[R]` int64. Each row draws once from its own generator, a CPU one, so that
        what it gets does not depend on the other rows; greedy choice draws nothing.

        Raises MoeLmError for logits that are no distribution (NaN, +inf, or -inf everywhere).
        """
        check_logits(logits_RV)
        if self.temperature == 0:
            return greedy(logits_RV)
        # In float64, so that rounding moves neither the edge of a top-p set nor a rare token's chance.
        logits_RV = logits_RV.cpu().double() if logits_RV.device.type == "mps" else logits_RV.double()
        logits_RV = with_temperature(logits_RV, self.temperature)
        if self.top_k is not None:
            logits_RV = keep_top_k(logits_RV, self.top_k)
        if self.top_p is not None:
            logits_RV = keep_top_p(logits_RV, self.top_p)
        return draw(logits_RV, generators)


GREEDY = Sampling(temperature=0.0)


def greedy(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row `[R]`; of equals the one with the smallest id."""
    return logits_RV.argmax(-1)


def with_temperature(logits_RV: Tensor, temperature: float) -> Tensor:
    """Logits over `temperature` > 0, shifted to a maximum of 0, so that no temperature is small enough to overflow."""
    return (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits_RV: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens of each row: exactly that many, also among equals."""
    best = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1)
    return torch.full_like(logits_RV, -math.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits_RV: Tensor, top_p: float) -> Tensor:
    """-inf for all but the smallest set of likeliest tokens whose probability reaches `top_p`; at least one."""
    if top_p == 1:
        return logits_RV  # a sum of rounded probabilities can reach 1 before the last token
    ordered, order = logits_RV.sort(dim=-1, descending=True, stable=True)
    reached = ordered.softmax(-1).cumsum(-1)
    superfluous = torch.zeros_like(reached, dtype=torch.bool)
    superfluous[:, 1:] = reached[:, :-1] >= top_p
    return torch.full_like(logits_RV, -math.inf).scatter(-1, order, ordered.masked_fill(superfluous, -math.inf))


def draw(logits_RV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row `[R]` with its softmax probability: the inverse of the distribution at one uniform number."""
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    reached = logits_RV.softmax(-1).cumsum(-1)
    # 1 - uniform is in (0, 1]: the first token that reaches it always exists and never has probability 0.
    wanted = (1 - uniform).to(reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, wanted)[:, 0]


def check_logits(logits_RV: Tensor) -> None:
    """Raise MoeLmError unless every row is a distribution."""
    broken = ~logits_RV.amax(-1).isfinite()
    if broken.any():
        row = int(broken.nonzero()[0])
        raise MoeLmError(
            f"the model's logits are not numbers (row {row}: largest {float(logits_RV[row].amax())}), so no token can "
            "be chosen; its weights are damaged or its training diverged, use an earlier checkpoint"
        )
