"""The choice of a token: against brute force, against the distribution it draws from, and on broken input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lm.errors import MoeLmError, UsageError
from moe_lm.generate.strategies import GREEDY, Sampling, draw, keep_top_k, keep_top_p, with_temperature

SKEWED = torch.tensor([4.0, -1.0, 3.0, 2.5, 0.0, 2.0, -6.0, 1.0, 3.5, -math.inf, -2.0, 0.5], dtype=torch.float64)
CHI_SQUARE_11 = 31.26  # 11 degrees of freedom reach it with probability 0.001

logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def kept(logits_RV: Tensor) -> set[int]:
    """The tokens of a single row that can be chosen."""
    return set(torch.isfinite(logits_RV[0]).nonzero()[:, 0].tolist())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def frequencies(sampling: Sampling, logits: Tensor, draws: int) -> list[int]:
    rows = logits.expand(draws, -1)
    return sampling(rows, generators(5) * draws).bincount(minlength=len(logits)).tolist()


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    expected = [sum(counts) * probability for probability in probabilities]
    return sum((count - want) ** 2 / want for count, want in zip(counts, expected, strict=True) if want)


@settings(deadline=None)  # the machine may be busy
@given(logits_lists, st.floats(0, 0.999))
def test_top_p_keeps_exactly_the_smallest_set_that_reaches_p(values: list[float], top_p: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    probabilities = logits.softmax(-1)[0]
    left = kept(keep_top_p(logits, top_p))
    left_out = set(range(len(values))) - left
    rarest = min(left, key=lambda token: values[token])
    assert all(values[rarest] >= values[token] for token in left_out)
    reached = sum(probabilities[token].item() for token in left)
    assert reached >= top_p - 1e-12
    assert len(left) == 1 or reached - probabilities[rarest].item() < top_p + 1e-12


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.0, {1}), (0.59, {1}), (0.61, {1, 2}), (0.89, {1, 2}), (0.91, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_on_a_skewed_distribution(top_p: float, expected: set[int]) -> None:
    logits = torch.tensor([[0.07, 0.6, 0.3, 0.03]], dtype=torch.float64).log()
    assert kept(keep_top_p(logits, top_p)) == expected


def test_top_p_1_keeps_tokens_too_rare_to_change_the_sum() -> None:
    assert kept(keep_top_p(torch.tensor([[0.0, -60.0, -700.0]], dtype=torch.float64), 1.0)) == {0, 1, 2}


@settings(deadline=None)  # the machine may be busy
@given(logits_lists, st.integers(1, 60))
def test_top_k_keeps_exactly_k_likeliest(values: list[float], top_k: int) -> None:
    left = kept(keep_top_k(torch.tensor([values]), top_k))
    assert len(left) == min(top_k, len(values))
    assert sorted(values)[-len(left) :] == sorted(torch.tensor([values])[0, list(left)].tolist())


@settings(deadline=None)  # the machine may be busy
@given(logits_lists, st.integers(0, 1000))
def test_top_k_1_and_temperature_0_and_top_p_0_are_greedy(values: list[float], seed: int) -> None:
    logits = torch.tensor([values])
    best = max(values)
    for sampling in (GREEDY, Sampling(top_k=1), Sampling(top_p=0.0), Sampling(temperature=0.0, top_k=3, top_p=0.5)):
        assert logits[0, sampling(logits, generators(seed))] == best


def test_greedy_takes_the_first_of_equals() -> None:
    assert GREEDY(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), generators(0, 0)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float) -> None:
    counts = frequencies(Sampling(temperature), SKEWED, 100_000)
    assert counts[9] == 0  # probability 0
    assert chi_square(counts, (SKEWED / temperature).softmax(0).tolist()) < CHI_SQUARE_11


def test_draws_follow_what_temperature_then_top_k_then_top_p_leave() -> None:
    sampling = Sampling(temperature=2.0, top_k=5, top_p=0.8)
    probabilities = (SKEWED / 2).softmax(0)
    best = probabilities.argsort(descending=True)[:5]
    of_five = probabilities[best] / probabilities[best].sum()
    needed = int((of_five.cumsum(0) < 0.8).sum()) + 1
    expected = torch.zeros_like(probabilities)
    expected[best[:needed]] = of_five[:needed] / of_five[:needed].sum()
    assert 1 < needed < 5
    counts = frequencies(sampling, SKEWED, 100_000)
    assert {token for token, count in enumerate(counts) if count} == set(best[:needed].tolist())
    assert chi_square(counts, expected.tolist()) < CHI_SQUARE_11


def test_first_draws_of_neighbouring_seeds_follow_the_distribution() -> None:
    rows = SKEWED.expand(20_000, -1)
    counts = draw(rows, generators(*range(20_000))).bincount(minlength=len(SKEWED)).tolist()
    assert chi_square(counts, SKEWED.softmax(0).tolist()) < CHI_SQUARE_11


def test_a_row_draws_the_same_whatever_the_other_rows() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(1.3, top_k=40, top_p=0.95)
    together = [sampling(logits, rows) for rows in [generators(7, 8, 9)] for _ in range(20)]
    alone = [sampling(logits[1:2], rows) for rows in [generators(8)] for _ in range(20)]
    assert [step[1].item() for step in together] == [step[0].item() for step in alone]
    assert len({step[1].item() for step in together}) > 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    assert with_temperature(SKEWED[None], temperature).softmax(-1)[0, 0] == 1
    assert Sampling(temperature)(SKEWED[None], generators(1)).tolist() == [0]


@pytest.mark.parametrize("broken", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1, top_p=0.5)])
def test_logits_without_a_distribution_are_an_error(broken: list[float], sampling: Sampling) -> None:
    with pytest.raises(MoeLmError, match=r"logits are not numbers \(row 1: largest .*earlier checkpoint"):
        sampling(torch.tensor([[0.0, 1.0], broken]), generators(0, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf)],
        *[("top_k", 0), ("top_k", -3), ("top_p", -0.1), ("top_p", 1.1), ("top_p", math.nan)],
    ],
)
def test_values_without_a_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]
