"""Whether two models compute the same: their logits and choices of experts for the same tokens.

Shapes: R rows, S positions, V vocabulary, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError

TOLERANCE = 1e-5  # absolute, of logits of order 1 in float32
NOISE_FACTOR = 4


class ForwardPass(NamedTuple):
    """A model's logits and choices of experts, and how far one more rounding in every layer moves them: the noise."""

    logits: Tensor  # [R, S, V]
    experts: list[Tensor]  # a layer: [R, S, k]
    scores: list[Tensor]  # a layer: [R, S, E], by which the experts were chosen; empty where unknown
    noise: float = 0.0  # of the logits
    noise_of_scores: Sequence[float] = ()  # a layer


@dataclass(frozen=True)
class Comparison:
    """How far two models agree on the same tokens."""

    tokens: str
    positions: int
    largest_difference: float  # of logits that are comparable
    tolerance: float
    largest_logit: float
    expert_choices: int
    other_experts: int  # choices that differ
    ties: int  # how many of these lie between experts whose scores differ by no more than rounding moves them
    positions_after_ties: int  # positions whose logits are not comparable

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


def compare_all(ours: Mapping[str, ForwardPass], theirs: Mapping[str, ForwardPass]) -> tuple[Comparison, ...]:
    """`compare` for each text by its name. Raises MoeLmError for the first on which the models do not agree."""
    comparisons = tuple(compare(name, ours[name], theirs[name]) for name in ours)
    for comparison in comparisons:
        if not comparison.equal:
            raise MoeLmError(f"the proof failed: {comparison}; nothing was kept")
    return comparisons


def compare(tokens: str, ours: ForwardPass, theirs: ForwardPass) -> Comparison:
    """Compare logits, within TOLERANCE or the noise of this model, whichever is larger, and the choices of experts.

    Two experts whose scores are equal up to rounding may change places. Whatever that row computes after such a tie is
    left out of the comparison, and counted.
    """
    rows, positions = ours.logits.shape[:2]
    tolerance = max(TOLERANCE, NOISE_FACTOR * ours.noise)
    choices = different = ties = 0
    *before_layers, comparable = _comparable(ours, theirs)
    layers = zip(ours.experts, theirs.experts, ours.scores, ours.noise_of_scores, before_layers, strict=True)
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


def with_noise(once: ForwardPass, disturbed: ForwardPass) -> ForwardPass:
    """A forward pass with its noise: its distance to the pass of the same model when disturbed.

    Positions after a tie that the disturbance broke are left out: there the distance is that between two experts.
    """
    *before_layers, comparable = _comparable(once, disturbed)
    layers = zip(once.scores, disturbed.scores, before_layers, strict=True)
    return once._replace(
        noise=_distance(once.logits, disturbed.logits, comparable),
        noise_of_scores=[_distance(mine, other, before) for mine, other, before in layers],
    )


def _comparable(ours: ForwardPass, theirs: ForwardPass) -> list[Tensor]:
    """Masks [R, S], before each layer and after the last: positions computed from the same choices of experts."""
    masks = [torch.ones(ours.logits.shape[:2], dtype=torch.bool)]
    for mine, other in zip(ours.experts, theirs.experts, strict=True):
        masks.append(masks[-1] & (_differ(mine, other).long().cumsum(-1) == 0))
    return masks


def _differ(mine: Tensor, other: Tensor) -> Tensor:
    return (mine.sort(-1).values != other.sort(-1).values).any(-1)


def _distance(mine: Tensor, other: Tensor, where: Tensor) -> float:
    distances = (mine - other).abs().amax(-1)[where]
    return float(distances.max()) if len(distances) else 0.0
