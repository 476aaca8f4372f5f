"""Scores of continuations against their definition, one token at a time, alone and in batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lm.common.errors import UsageError
from moe_lm.evaluate.scoring import Request, Score, SessionScorer
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.tiny import logits_of, tiny_model

POSITIONS = 16


@pytest.fixture(scope="module")
def session(tiny_tokenizer: Tokenizer) -> Session:
    model: LanguageModel = tiny_model(vocab_size=1024, max_position_embeddings=POSITIONS).eval()
    return Session(Path("nowhere"), model, tiny_tokenizer)


@torch.no_grad()
def by_definition(model: LanguageModel, request: Request) -> Score:
    """Every token of the continuation after the last POSITIONS tokens before the last one."""
    ids = [*request.context, *request.continuation][-(POSITIONS + 1) :]
    log_probs = logits_of(model, ids[:-1])[-len(request.continuation) :].log_softmax(-1)
    found = [float(row[token]) for row, token in zip(log_probs, request.continuation, strict=True)]
    return Score(sum(found), log_probs.argmax(-1).tolist() == list(request.continuation))


def requests(session: Session) -> list[Request]:
    """Short and long ones, one that is cut from the left, and two that greedy decoding writes."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(1, 1), (4, 3), (9, 7), (14, 5), (2, POSITIONS), (30, 2)]
    ids = [torch.randint(3, 1024, (context + more,), generator=draw).tolist() for context, more in sizes]
    found = [Request(item[:context], item[context:]) for item, (context, _) in zip(ids, sizes, strict=True)]
    for context in ([5, 6, 7], [900]):
        likeliest = list(context)
        for _ in range(3):
            likeliest.append(int(logits_of(session.model, likeliest)[-1].argmax()))
        found.append(Request(context, likeliest[len(context) :]))
    return found


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_scores_are_the_sums_of_token_log_probabilities(session: Session, batch_size: int | None) -> None:
    asked = requests(session)
    told: list[tuple[int, int]] = []
    found = SessionScorer(session, batch_size, tell=lambda done, total: told.append((done, total))).score(asked)
    for request, score in zip(asked, found, strict=True):
        expected = by_definition(session.model, request)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
        assert score.is_greedy is expected.is_greedy
    assert [score.is_greedy for score in found] == [False] * 6 + [True] * 2
    assert told[-1] == (8, 8)


@pytest.mark.parametrize("size", [0, POSITIONS + 1])
def test_a_continuation_that_the_model_cannot_read_is_refused(session: Session, size: int) -> None:
    with pytest.raises(UsageError, match=f"likelihood of {size} tokens; expected 1 to 16"):
        SessionScorer(session).score([Request([1], [5] * size)])


def test_texts_are_those_of_sampling(session: Session) -> None:
    prompts = [[0, 70, 71], [0, 80]]
    found = SessionScorer(session).write(prompts, Settings(max_new_tokens=6), ())
    alone = ["".join(delta.text for delta in session.write([prompt], Settings(6))) for prompt in prompts]
    assert found == alone
    assert all(found)
