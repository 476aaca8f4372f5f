"""Comparing what two models make of the same tokens.

Shapes: R rows, S positions, V vocabulary, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-5  # absolute, of logits of order 1 in float32
NOISE_FACTOR = 4


class Seen(NamedTuple):
    """What a model said. `noise` is how far its logits move when every layer reads its input with a rounding more."""

    logits: Tensor  # [R, S, V]
    experts: list[Tensor]  # a layer: [R, S, k]
    choices: list[Tensor]  # a layer: [R, S, E], what the choice of experts went by; empty where unknown
    noise: float


@dataclass(frozen=True)
class Comparison:
    """How two models agree on some tokens."""

    tokens: str
    positions: int
    largest_difference: float
    tolerance: float
    largest_logit: float
    expert_choices: int
    other_experts: int  # choices that differ
    ties: int  # of these, those between experts whose scores differ by less than the tolerance
    positions_after_ties: int  # whose logits are not comparable

    @property
    def equal(self) -> bool:
        few = self.positions_after_ties <= self.positions // 4
        return self.largest_difference <= self.tolerance and self.other_experts == self.ties and few

    def __str__(self) -> str:
        experts = "no experts to choose"
        if self.expert_choices:
            same = self.expert_choices - self.other_experts
            experts = f"{same:,} of {self.expert_choices:,} choices of experts the same"
            if self.ties:
                experts += f" ({self.ties} ties, {self.positions_after_ties} positions left out after them)"
        return (
            f"{self.positions} {self.tokens} tokens: largest difference of logits {self.largest_difference:.1e} "
            f"(largest logit {self.largest_logit:.1f}, tolerance {self.tolerance:.1e}), {experts}"
        )


def compare(tokens: str, ours: Seen, theirs: Seen) -> Comparison:
    """Logits within TOLERANCE, or within what rounding does to this model where that is more, and the same experts.

    Two experts whose scores are equal up to rounding may change places; what is computed from there on in that row is
    left out, and counted.
    """
    rows, positions = ours.logits.shape[:2]
    tolerance = max(TOLERANCE, NOISE_FACTOR * ours.noise)
    choices = different = ties = 0
    comparable = torch.ones(rows, positions, dtype=torch.bool)
    for mine, other, scores in zip(ours.experts, theirs.experts, ours.choices, strict=True):
        wrong = (mine.sort(-1).values != other.sort(-1).values).any(-1)
        choices += wrong.numel()
        # After a tie was broken otherwise, what later layers choose is no longer about the same input.
        counted = wrong & comparable
        gaps = scores.gather(-1, mine).sum(-1) - scores.gather(-1, other).sum(-1)
        different += int(counted.sum())
        ties += int((counted & (gaps.abs() < tolerance)).sum())
        comparable &= wrong.long().cumsum(-1) == 0
    difference = (ours.logits - theirs.logits).abs().amax(-1)
    finite = torch.where(difference.isnan(), torch.inf, difference)
    return Comparison(
        tokens=tokens,
        positions=rows * positions,
        largest_difference=float(finite[comparable].max()) if comparable.any() else float("inf"),
        tolerance=tolerance,
        largest_logit=float(theirs.logits.abs().max()),
        expert_choices=choices,
        other_experts=different,
        ties=ties,
        positions_after_ties=rows * positions - int(comparable.sum()),
    )
