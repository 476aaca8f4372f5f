"""Decoding with a cache gives what decoding without one gives, whatever the attention, rows, prefill and kernels."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch

from moe_lm.generate.decode import Decoder, Settings, Step
from moe_lm.generate.strategies import Sampling
from moe_lm.kernels import cpu_decode, kernels
from moe_lm.kernels.device import compiling_needs
from moe_lm.kernels.native import build as native
from moe_lm.model.transformer import LanguageModel
from tests.generate.uncached import KINDS, POSITIONS, VOCABULARY, build, full_logits, uncached_steps

needs_compiler = pytest.mark.skipif(
    compiling_needs(torch.device("cpu")) is not None, reason="torch.compile lacks something here"
)
needs_cpp = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler")
STOP_IDS = range(0, VOCABULARY, 11)
PENALISED = Sampling(
    temperature=0.8, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, no_repeat_ngram=2
)
VARIED = [
    Settings(9),
    Settings(14, Sampling(temperature=1.2, top_p=0.9), seed=5, routing=True),
    Settings(6, PENALISED, seed=77, min_new_tokens=4),
    Settings(11, Sampling(temperature=1.5, typical_p=0.9, logit_bias=((3, 2.0),)), routing=True),
    Settings(8, Sampling(temperature=0.0, no_repeat_ngram=1), logprobs=2),
]


def requests(number: int) -> list[tuple[list[int], Settings]]:
    """Prompts of mixed lengths, each with settings of its own."""
    draw = random.Random(2)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.choice([1, 2, 5, 13, 21]))] for _ in range(number)]
    return [(prompt, VARIED[place % len(VARIED)]) for place, prompt in enumerate(prompts)]


@functools.cache
def expected(kind: str) -> dict[int, list[Step]]:
    """The steps of twelve requests without a cache, in plain kernels."""
    model = build(kind)
    return {place: uncached_steps(model, place, *asked, STOP_IDS) for place, asked in enumerate(requests(12))}


def written(decoder: Decoder) -> dict[int, list[Step]]:
    """The steps of twelve requests: tokens, ends and experts."""
    for prompt, settings in requests(12):
        decoder.add(prompt, settings, STOP_IDS)
    found: dict[int, list[Step]] = {}
    for step in decoder.run():
        found.setdefault(step.request, []).append(step._replace(logprob=None, alternatives=()))
    return found


ROWS = list(itertools.product((1, 3, 20), (4, 16, 2048)))  # slots, and prefill tokens
BOTH_ATTENTIONS = ("grouped-query", "latent")


@pytest.mark.parametrize("decoding", ["plain", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    ("kind", "slots", "prefill_tokens"),
    [(kind, *rows) for kind in KINDS for rows in (ROWS if kind in BOTH_ATTENTIONS else [(3, 4), (20, 2048)])],
)
def test_cached_equals_uncached(kind: str, slots: int, prefill_tokens: int, decoding: str) -> None:
    """Prompts over 4 or 16 tokens come in pieces; rows are refilled; texts end at a stop token or at their length."""
    model = build(kind)
    kernels.apply(model, kernels.choose(model.device)._replace(decoding=decoding))
    assert written(Decoder(model, slots, POSITIONS, prefill_tokens=prefill_tokens)) == expected(kind)
    ends = {steps[-1].finish for steps in expected(kind).values()}
    assert ends == {"stop", "length"}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", BOTH_ATTENTIONS)
def test_compiled_equals_uncached(kind: str) -> None:
    model = build(kind)
    if native.library() is not None:
        cpu_decode.apply(model)  # which gives way to the compiler
    assert written(Decoder(model, 3, POSITIONS, prefill_tokens=8, compiled=True)) == expected(kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BOTH_ATTENTIONS)
def test_cuda_graphs_equal_single_kernels(kind: str) -> None:
    model = build(kind).cuda()
    kernels.apply(model, kernels.choose(model.device, decoding=True))
    found = [written(Decoder(model, 3, POSITIONS, prefill_tokens=8, compiled=compiled)) for compiled in (True, False)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", BOTH_ATTENTIONS)
def test_log_probabilities_are_the_models_own(kind: str, dtype: torch.dtype, atol: float) -> None:
    """Before temperature, penalties and the rest, over the ids that may be chosen; only for rows that ask."""
    model: LanguageModel = build(kind).to(dtype)
    settings = Settings(6, Sampling(temperature=1.3, top_k=5, repetition_penalty=1.5), seed=3, logprobs=3)
    decoder = Decoder(model, 2, POSITIONS, vocab_size=90)
    decoder.add([8, 6, 7], settings)
    decoder.add([5, 6], Settings(6))
    ids = [8, 6, 7]
    for step in decoder.run():
        if step.request == 1:
            assert step.logprob is None
            continue
        assert step.token is not None
        log_p = full_logits(model, ids)[-1, :90].float().log_softmax(-1)
        assert step.logprob == pytest.approx(log_p[step.token].item(), abs=atol)
        best = log_p.topk(3)
        assert [value for _, value in step.alternatives] == pytest.approx(best.values.tolist(), abs=atol)
        if dtype == torch.float32:
            assert [token for token, _ in step.alternatives] == best.indices.tolist()
        ids.append(step.token)
    assert len(ids) == 9
