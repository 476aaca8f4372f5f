"""Scheduled sampling: where the model's own tokens go, and the step against one that goes token by token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe_lm.config.training import BalanceConfig, ScheduledSamplingConfig, TrainConfig
from moe_lm.data.batches import IGNORE, Batch, BatchSource
from moe_lm.objective.scheduled_sampling import is_target_prefix, share_of, with_own_tokens
from moe_lm.objective.training_loss import NextToken, StepCounts, TrainingLoss
from moe_lm.train.loop import local_micro_batches
from tests.objective.gradients import assert_same_gradients, gradients
from tests.tiny import engine_of, logits_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, PAD = 6, 2


def half_own(batch: Batch, rows: range = range(ROWS), step: int = 0, seed: int = 5) -> Batch:
    return with_own_tokens(batch, ScheduledSamplingConfig(share=0.5), seed, step, rows)


# Where


def test_only_what_was_a_target_is_replaced(ragged: BatchSource) -> None:
    """Token by token: the position before it in the same document is trained to give it."""
    batch = ragged.batch(0, range(ROWS))
    found, starts = is_target_prefix(batch), set(batch.cu_seqlens.tolist())
    ids, targets = batch.input_ids.flatten().tolist(), batch.targets.flatten().tolist()
    expected = [
        place not in starts and targets[place - 1] != IGNORE and targets[place - 1] == ids[place]
        for place in range(len(ids))
    ]
    assert found.flatten().tolist() == expected
    assert 20 < sum(expected) < len(ids) - 20


def test_a_document_that_follows_without_a_bound_is_not_the_answer_of_the_one_before(ragged: BatchSource) -> None:
    """With separate_documents=false the end of an answer is a target, and the next token begins another document."""
    batch = ragged.batch(0, range(ROWS))
    batch.targets[0, 10], batch.input_ids[0, 11] = 1, 0
    batch = replace(batch, cu_seqlens=torch.arange(ROWS + 1, dtype=torch.int32) * batch.input_ids.shape[1])
    assert not is_target_prefix(batch)[0, 11]


def test_the_places_are_a_function_of_seed_step_row_and_position(ragged: BatchSource) -> None:
    whole = half_own(ragged.batch(3, range(ROWS)), step=3).own_tokens
    assert whole is not None
    pieces = (range(2), range(2, 3), range(3, 6))
    parts: list[Any] = [half_own(ragged.batch(3, piece), piece, step=3).own_tokens for piece in pieces]
    assert torch.equal(torch.cat(parts), whole)
    for other in ({"seed": 6}, {"step": 4}, {"rows": range(1, ROWS + 1)}):
        again = half_own(ragged.batch(3, range(ROWS)), **{"step": 3} | other).own_tokens  # type: ignore[arg-type]
        assert again is not None
        assert not torch.equal(again, whole)


def test_the_share_is_that_of_the_target_tokens(ragged: BatchSource) -> None:
    replaced = prefixes = 0
    for step in range(60):
        batch = half_own(ragged.batch(step, range(ROWS)), step=step)
        assert batch.own_tokens is not None
        replaced += int(batch.own_tokens.sum())
        prefixes += int(is_target_prefix(batch).sum())
    assert replaced / prefixes == pytest.approx(0.5, abs=0.03)


def test_the_share_grows_in_a_line() -> None:
    config = ScheduledSamplingConfig(share=0.4, ramp_steps=4)
    assert [share_of(step, config) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert share_of(0, ScheduledSamplingConfig(share=0.4)) == 0.4


# What


def test_loss_and_gradients_are_those_of_a_pass_that_goes_token_by_token(ragged: BatchSource) -> None:
    loss = TrainingLoss(tiny_model(seed=3), NextToken(), BalanceConfig(bias_update_rate=0, sequence_loss=0), PAD)
    batch = half_own(ragged.batch(0, range(ROWS)))
    assert batch.own_tokens is not None
    total, changed, targets = torch.zeros(()), 0, 0
    flat = [tensor.flatten().tolist() for tensor in (batch.input_ids, batch.targets, batch.own_tokens)]
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        true_ids, document_targets, own = (values[start:end] for values in flat)
        read = list(true_ids)
        for place in range(1, end - start):
            if own[place]:
                read[place] = int(logits_of(loss.model, true_ids[:place])[-1].argmax())
                changed += read[place] != true_ids[place]
        logits = logits_of(loss.model, read)
        for place, target in enumerate(document_targets):
            if target != IGNORE:
                total, targets = total - F.log_softmax(logits[place], -1)[target], targets + 1
    assert changed > 10
    total = total / targets
    part = loss(batch, StepCounts(targets, targets, 100, ROWS))
    torch.testing.assert_close(part.loss, total, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(loss, part.loss), gradients(loss, total))
    without = loss(replace(batch, own_tokens=None), StepCounts(targets, targets, 100, ROWS)).loss
    assert abs(without.item() - total.item()) > 1e-3


def test_accumulation_changes_nothing(ragged: BatchSource) -> None:
    results = []
    for micro in (None, 1, 2):
        train = TrainConfig.model_validate({
            "steps": 10, "global_batch_size": ROWS, "micro_batch_size": micro, "precision": "float32",
            "balance": {"batch_loss": 0.5}, "scheduled_sampling": {"share": 0.6},
        })  # fmt: skip
        engine = engine_of(tiny_model(seed=3), train)
        results.append([engine.train_step(n, local_micro_batches(engine, ragged, train, n)) for n in range(3)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            figures: list[tuple[Any, Any]] = [(r.loss, r.balance_loss) for r in (one, two)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-6)
            assert torch.equal(one.load, two.load)
