"""Comparing what two models make of the same tokens.

Shapes: R rows, S positions, V vocabulary, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-5  # absolute, of logits of order 1 in float32
NOISE_FACTOR = 4


class Seen(NamedTuple):
    """What a model said, and how far that moves when every layer reads its input with a rounding more: `noise`."""

    logits: Tensor  # [R, S, V]
    experts: list[Tensor]  # a layer: [R, S, k]
    choices: list[Tensor]  # a layer: [R, S, E], what the choice of experts went by; empty where unknown
    noise: float = 0.0  # of the logits
    noise_of_choices: Sequence[float] = ()  # a layer


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
    ties: int  # of these, those between experts whose scores differ by no more than rounding moves them
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
    *before_layers, comparable = _comparable(ours, theirs)
    layers = zip(ours.experts, theirs.experts, ours.choices, ours.noise_of_choices, before_layers, strict=True)
    for mine, other, scores, noise, before in layers:
        counted = _differ(mine, other) & before
        gaps = scores.gather(-1, mine).sum(-1) - scores.gather(-1, other).sum(-1)
        choices += counted.numel()
        different += int(counted.sum())
        ties += int((counted & (gaps.abs() <= NOISE_FACTOR * noise)).sum())
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


def with_noise(seen: Seen, disturbed: Seen) -> Seen:
    """What a model said, with how far that is from what it said when it was disturbed.

    Where the disturbance broke a tie otherwise, the distance is that between two experts, which is no rounding.
    """
    *before_layers, comparable = _comparable(seen, disturbed)
    layers = zip(seen.choices, disturbed.choices, before_layers, strict=True)
    return seen._replace(
        noise=_distance(seen.logits, disturbed.logits, comparable),
        noise_of_choices=[_distance(mine, other, before) for mine, other, before in layers],
    )


def _comparable(ours: Seen, theirs: Seen) -> list[Tensor]:
    """[R, S] before each layer and behind the last: where nothing was computed from another choice of experts."""
    masks = [torch.ones(ours.logits.shape[:2], dtype=torch.bool)]
    for mine, other in zip(ours.experts, theirs.experts, strict=True):
        masks.append(masks[-1] & (_differ(mine, other).long().cumsum(-1) == 0))
    return masks


def _differ(mine: Tensor, other: Tensor) -> Tensor:
    return (mine.sort(-1).values != other.sort(-1).values).any(-1)


def _distance(mine: Tensor, other: Tensor, where: Tensor) -> float:
    distances = (mine - other).abs().amax(-1)[where]
    return float(distances.max()) if len(distances) else 0.0
