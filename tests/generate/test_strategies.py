"""The choice of a token: against brute force, against the distribution it draws from, and on broken input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from moe_lm.common.errors import MoeLmError
from moe_lm.generate.penalties import Text, penalised
from moe_lm.generate.strategies import (
    GREEDY,
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    token_at,
    with_temperature,
)

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


@given(logits_lists, st.integers(1, 60))
def test_top_k_keeps_exactly_k_likeliest(values: list[float], top_k: int) -> None:
    left = kept(keep_top_k(torch.tensor([values]), top_k))
    assert len(left) == min(top_k, len(values))
    assert sorted(values)[-len(left) :] == sorted(torch.tensor([values])[0, list(left)].tolist())


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
    counts = frequencies(Sampling(temperature=temperature), SKEWED, 100_000)
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


ADVERSARIAL = {
    "skewed": SKEWED,
    "nearly equal": torch.arange(12, dtype=torch.float64) ** 1.5 * -1e-6,
    "one and many": torch.tensor([8.0] + [-1e-6 * token**1.5 for token in range(11)], dtype=torch.float64),
    "two far apart": torch.tensor([30.0, -30.0] + [-math.inf] * 10, dtype=torch.float64),
    "a staircase": -torch.arange(12, dtype=torch.float64) / 3,
}
STRATEGIES = {
    "temperature": Sampling(temperature=1.7),
    "top-k": Sampling(top_k=4),
    "top-p": Sampling(top_p=0.85),
    "min-p": Sampling(min_p=0.2),
    "typical": Sampling(typical_p=0.7),
    "repetition": Sampling(repetition_penalty=1.6),
    "presence": Sampling(presence_penalty=1.2),
    "frequency": Sampling(frequency_penalty=0.7),
    "n-grams": Sampling(no_repeat_ngram=2),
    "bias": Sampling(logit_bias=((0, -math.inf), (5, 3.0))),
    "all": Sampling(
        temperature=1.3, top_k=9, top_p=0.95, min_p=0.02, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, no_repeat_ngram=3, logit_bias=((1, 1.0),),
    ),
}  # fmt: skip
WRITTEN = Text([3, 8, 0, 0, 8, 3, 8], prompt=2)  # 0 comes after 8, 3 after 8 as well


def exact(sampling: Sampling, logits: list[float]) -> list[float]:
    """Probabilities by the definitions, token by token."""
    values, ids = list(logits), list(WRITTEN.ids)
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in set(ids):
        penalty = sampling.repetition_penalty
        values[token] = values[token] * penalty if values[token] < 0 else values[token] / penalty
        count = ids[WRITTEN.prompt :].count(token)
        values[token] -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
    if (size := sampling.no_repeat_ngram) is not None:
        runs = {tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)}
        values = [-math.inf if (*ids[len(ids) - size + 1 :], t) in runs else value for t, value in enumerate(values)]
    weights = [math.exp((value - max(values)) / sampling.temperature) for value in values]

    def by(rank: list[float]) -> list[int]:
        return sorted(range(len(weights)), key=lambda token: (rank[token], token))

    def keep(tokens: list[int]) -> None:
        weights[:] = [weight if token in tokens else 0.0 for token, weight in enumerate(weights)]

    def until(mass: float, order: list[int]) -> list[int]:
        total, kept_tokens = 0.0, []
        for token in order:
            if total >= mass:
                break
            kept_tokens.append(token)
            total += weights[token] / sum(weights)
        return kept_tokens

    if sampling.top_k is not None:
        keep(by([-weight for weight in weights])[: sampling.top_k])
    if sampling.top_p is not None:
        keep(until(sampling.top_p, by([-weight for weight in weights])))
    if sampling.min_p is not None:
        keep([token for token, weight in enumerate(weights) if weight >= sampling.min_p * max(weights)])
    if sampling.typical_p is not None:
        surprise = [-math.log(weight / sum(weights)) if weight else math.inf for weight in weights]
        entropy = sum(weight / sum(weights) * s for weight, s in zip(weights, surprise, strict=True) if weight)
        keep(until(sampling.typical_p, by([abs(s - entropy) for s in surprise])))
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("logits", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize("sampling", STRATEGIES.values(), ids=STRATEGIES)
def test_100000_draws_of_every_strategy_follow_its_exact_distribution(sampling: Sampling, logits: Tensor) -> None:
    after = sampling.kept(penalised(logits[None], sampling, [WRITTEN]))
    probabilities = exact(sampling, logits.tolist())
    torch.testing.assert_close(after.softmax(-1)[0].tolist(), probabilities)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = token_at(after.expand(100_000, -1), uniform).bincount(minlength=12).tolist()
    assert all(count == 0 for count, probability in zip(counts, probabilities, strict=True) if probability == 0)
    assert chi_square(counts, probabilities) < CHI_SQUARE_11
    [token] = sampling(logits[None], generators(5), [WRITTEN]).tolist()
    assert token == draw(after, generators(5))


@given(logits_lists, st.floats(0, 1))
def test_min_p_keeps_exactly_what_is_likely_enough(values: list[float], min_p: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    shares = (logits - logits.amax()).exp()[0].tolist()
    left = kept(keep_min_p(logits, min_p))
    assert all(share >= min_p - 1e-12 if token in left else share < min_p + 1e-12 for token, share in enumerate(shares))
    assert max(range(len(values)), key=lambda token: values[token]) in left


@given(logits_lists, st.floats(0, 0.999))
def test_typical_keeps_exactly_the_smallest_set_that_reaches_its_mass(values: list[float], mass: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    log_p = logits.log_softmax(-1)[0].tolist()
    entropy = -sum(math.exp(value) * value for value in log_p)
    oddness = [abs(entropy + value) for value in log_p]
    left = kept(keep_typical(logits, mass))
    oddest = max(left, key=lambda token: oddness[token])
    assert all(oddness[oddest] <= oddness[token] + 1e-9 for token in set(range(len(values))) - left)
    reached = sum(math.exp(log_p[token]) for token in left)
    assert reached >= mass - 1e-9
    assert len(left) == 1 or reached - max(math.exp(log_p[t]) for t in left if oddness[t] >= oddness[oddest]) < mass


@pytest.mark.parametrize(
    ("warper", "value", "sampling"),
    [
        *[("TemperatureLogitsWarper", value, Sampling(temperature=value)) for value in (0.3, 2.0)],
        *[("TopKLogitsWarper", value, Sampling(top_k=value)) for value in (1, 7, 500)],
        *[("TopPLogitsWarper", value, Sampling(top_p=value)) for value in (0.1, 0.9)],
        *[("MinPLogitsWarper", value, Sampling(min_p=value)) for value in (0.0, 0.05, 0.7, 1.0)],
        *[("TypicalLogitsWarper", value, Sampling(typical_p=value)) for value in (0.1, 0.5, 0.95)],
    ],
)
def test_the_same_distribution_as_transformers(warper: str, value: float, sampling: Sampling) -> None:
    logits = torch.randn(40, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    expected = getattr(logits_process, warper)(value)(torch.zeros(40, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(sampling.kept(logits).softmax(-1), expected.softmax(-1))


def test_first_draws_of_neighbouring_seeds_follow_the_distribution() -> None:
    rows = SKEWED.expand(20_000, -1)
    counts = draw(rows, generators(*range(20_000))).bincount(minlength=len(SKEWED)).tolist()
    assert chi_square(counts, SKEWED.softmax(0).tolist()) < CHI_SQUARE_11


def test_a_row_draws_the_same_whatever_the_other_rows() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95)
    together = [sampling(logits, rows) for rows in [generators(7, 8, 9)] for _ in range(20)]
    alone = [sampling(logits[1:2], rows) for rows in [generators(8)] for _ in range(20)]
    assert [step[1].item() for step in together] == [step[0].item() for step in alone]
    assert len({step[1].item() for step in together}) > 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    assert with_temperature(SKEWED[None], temperature).softmax(-1)[0, 0] == 1
    assert Sampling(temperature=temperature)(SKEWED[None], generators(1)).tolist() == [0]


@pytest.mark.parametrize("broken", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1, top_p=0.5)])
def test_logits_without_a_distribution_are_an_error(broken: list[float], sampling: Sampling) -> None:
    with pytest.raises(MoeLmError, match=r"logits are not numbers \(row 1: largest .*earlier checkpoint"):
        sampling(torch.tensor([[0.0, 1.0], broken]), generators(0, 1))
