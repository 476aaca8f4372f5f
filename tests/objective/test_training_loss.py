"""The loss of a step: against one document at a time, in parts that add up, and where there is nothing to learn."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.config.training import BalanceConfig
from moe_lm.data.batches import IGNORE, Batch, BatchSource
from moe_lm.model.moe import Routing, all_logical
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import NextToken, StepCounts, TrainingLoss, num_targets
from tests.objective.gradients import assert_same_gradients, gradients
from tests.tiny import logits_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 2
ROWS = 6
OFF = BalanceConfig(bias_update_rate=0, sequence_loss=0)
ALL = BalanceConfig(sequence_loss=0.3, batch_loss=0.5, z_loss=0.1)
A_LOAD = torch.tensor([[5, 0, 9, 1, 1, 30, 2, 2], [4, 4, 4, 4, 1, 1, 1, 31]])  # of a step before, two layers


def build_loss(balance: BalanceConfig, model: LanguageModel | None = None, **options: Any) -> TrainingLoss:
    return TrainingLoss(model or tiny_model(seed=3, num_experts_per_tok=2), NextToken(), balance, PAD, **options)


def counts_of(batch: Batch, load: Tensor | None = None) -> StepCounts:
    return StepCounts(num_targets(batch), num_targets(batch), tokens_of(batch), len(batch.input_ids), load)


def tokens_of(batch: Batch) -> int:
    return int((batch.input_ids != PAD).sum())


def routings(loss: TrainingLoss, batch: Batch) -> list[Routing]:
    return loss.predict(batch)[1]


# Cross-entropy


def test_loss_is_the_mean_over_all_targets_of_documents_run_alone(ragged: BatchSource) -> None:
    loss, batch = build_loss(OFF), ragged.batch(0, range(ROWS))
    part = loss(batch, counts_of(batch))
    logits, targets = [], []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        logits.append(logits_of(loss.model, batch.input_ids.flatten()[start:end].tolist()))
        targets.append(batch.targets.flatten()[start:end].long())
    reference = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE)
    torch.testing.assert_close(part.loss, reference)
    torch.testing.assert_close(part.sums["loss"], reference.detach() * num_targets(batch))
    assert_same_gradients(gradients(loss, part.loss), gradients(loss, reference))


# Parts


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 1, 1], [2, 4]])
def test_parts_add_up_whatever_the_micro_batches(ragged: BatchSource, sizes: list[int]) -> None:
    loss, whole = build_loss(ALL), ragged.batch(0, range(ROWS))
    counts = counts_of(whole, A_LOAD)
    expected = loss(whole, counts)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    batches = [ragged.batch(0, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    parts = [loss(batch, counts) for batch in batches]
    for name in ("loss", "balance"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(expected, name))
    torch.testing.assert_close(sum(part.sums["loss"] for part in parts), expected.sums["loss"])
    assert torch.equal(torch.stack([part.load for part in parts]).sum(0), expected.load)
    assert_same_gradients(gradients(loss, *(part.loss for part in parts)), gradients(loss, expected.loss))


# Balance


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_z_loss_is_a_mean_over_tokens_summed_over_layers(ragged: BatchSource, weight: float) -> None:
    loss, batch = build_loss(BalanceConfig(sequence_loss=0, z_loss=weight)), ragged.batch(0, range(ROWS))
    counted = (batch.input_ids != PAD).flatten()
    expected = sum(routing.logits[counted].logsumexp(-1).square().mean() for routing in routings(loss, batch))
    torch.testing.assert_close(loss(batch, counts_of(batch)).balance, weight * expected.detach())


def test_batch_loss_is_experts_times_load_share_of_the_step_before_times_mean_score(ragged: BatchSource) -> None:
    loss, batch = build_loss(BalanceConfig(sequence_loss=0, batch_loss=0.5)), ragged.batch(0, range(ROWS))
    counted = (batch.input_ids != PAD).flatten()
    expected = 0.0
    for routing, load in zip(routings(loss, batch), A_LOAD, strict=True):
        shares = (routing.scores / routing.scores.sum(-1, keepdim=True))[counted].mean(0)
        expected += 8 * (load / load.sum() * shares).sum().item()
    assert loss(batch, counts_of(batch, A_LOAD)).balance.item() == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("load", [None, torch.zeros(2, 8, dtype=torch.int64)])
def test_without_a_step_before_the_batch_loss_is_its_least_and_moves_nothing(
    ragged: BatchSource, load: Tensor | None
) -> None:
    loss, batch = build_loss(BalanceConfig(sequence_loss=0, batch_loss=0.5)), ragged.batch(0, range(ROWS))
    batch.targets.fill_(IGNORE)
    part = loss(batch, StepCounts(1, 1, tokens_of(batch), ROWS, load))
    assert part.balance.item() == pytest.approx(2 * 0.5, rel=1e-6)
    moved = gradients(loss, part.loss)["model.layers.2.mlp.gate.weight"]
    assert float(moved.abs().max()) < 1e-8


def test_sequence_loss_is_a_mean_over_rows(ragged: BatchSource) -> None:
    loss = build_loss(BalanceConfig(sequence_loss=0.5))
    whole = ragged.batch(0, range(ROWS))
    rows = [ragged.batch(0, range(row, row + 1)) for row in range(ROWS)]
    alone = [loss(row, counts_of(row)).balance.item() for row in rows]
    assert loss(whole, counts_of(whole)).balance.item() == pytest.approx(sum(alone) / ROWS, rel=1e-5)


def test_balance_is_a_part_of_the_loss_that_moves_the_router_alone_by_itself(ragged: BatchSource) -> None:
    loss, batch = build_loss(ALL), ragged.batch(0, range(ROWS))
    part = loss(batch, counts_of(batch))
    torch.testing.assert_close(part.loss, part.sums["loss"] / num_targets(batch) + part.balance)
    batch.targets.fill_(IGNORE)
    found = gradients(loss, loss(batch, StepCounts(1, 1, 100, ROWS)).loss)
    assert float(found["model.layers.2.mlp.gate.weight"].abs().max()) > 0
    assert float(found["model.layers.2.mlp.experts.down_proj"].abs().max()) == 0
    assert float(found["lm_head.weight"].abs().max()) == 0


def test_everything_but_the_loss_is_detached(ragged: BatchSource) -> None:
    """A step keeps the parts of all its micro-batches; a graph in them would keep their activations."""
    loss, batch = build_loss(ALL), ragged.batch(0, range(ROWS))
    part = loss(batch, counts_of(batch))
    tensors = {**part._asdict(), **part.sums, "values": torch.zeros(()), "sums": part.sums["loss"], **part.values}
    tensors["loss of the parts"] = part.loss
    assert [name for name, tensor in tensors.items() if tensor.requires_grad] == ["loss of the parts"]


# Load


def test_load_counts_every_token_but_padding_in_every_layer(ragged: BatchSource) -> None:
    loss, batch = build_loss(ALL), ragged.batch(0, range(ROWS))
    load = loss(batch, counts_of(batch)).load
    counted = (batch.input_ids != PAD).flatten()
    assert load.dtype == torch.int64
    expected = [routing.experts[counted].flatten().bincount(minlength=8) for routing in routings(loss, batch)]
    assert torch.equal(load, torch.stack(expected))
    assert load.sum(1).tolist() == [2 * int(counted.sum())] * 2


def test_a_dense_model_has_no_load_and_no_balance(ragged: BatchSource) -> None:
    loss, batch = build_loss(ALL, tiny_model(n_routed_experts=0)), ragged.batch(0, range(ROWS))
    part = loss(batch, counts_of(batch))
    assert (part.load.shape, part.entropy.shape, float(part.balance)) == ((0, 0), (0,), 0.0)


# Nothing to learn from (FAULTS rows 22 and 23)


def test_a_batch_without_targets_has_loss_0_and_zero_gradients(ragged: BatchSource) -> None:
    loss, batch = build_loss(OFF), ragged.batch(0, range(ROWS))
    batch.targets.fill_(IGNORE)
    part = loss(batch, StepCounts(units=1, targets=1, tokens=100, rows=ROWS))
    assert part.loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, part.loss).values())


def test_a_batch_of_padding_alone_is_finite(ragged: BatchSource) -> None:
    loss, batch = build_loss(ALL), ragged.batch(0, range(ROWS))
    batch.input_ids.fill_(PAD)
    batch.targets.fill_(IGNORE)
    part = loss(batch, StepCounts(units=1, targets=1, tokens=1, rows=ROWS))
    assert part.loss.item() == 0
    assert int(part.load.sum()) == 0
    assert all(gradient.isfinite().all() for gradient in gradients(loss, part.loss).values())


def test_experts_without_a_token_get_zero_gradients(ragged: BatchSource) -> None:
    """A bias sends every token to experts 0 and 1; the others' gradients are zero, not None."""
    loss, batch = build_loss(ALL), ragged.batch(0, range(ROWS))
    for layer in loss.model.moe_layers:
        layer.gate.e_score_correction_bias[:2] = 100.0
    part = loss(batch, counts_of(batch))
    assert part.load[:, 2:].eq(0).all()
    assert part.load[:, :2].gt(0).all()
    found = gradients(loss, part.loss)
    assert found.keys() == all_logical(loss.model.named_parameters()).keys()
    for layer in (1, 2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            gradient = found[f"model.layers.{layer}.mlp.experts.{name}"]
            assert not gradient[2:].any()
            assert all(gradient[expert].any() for expert in (0, 1))
