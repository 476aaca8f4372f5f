"""DPO: the loss against its formula and against trl's, and log-probabilities of packed answers against lone ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.config.training import BalanceConfig, PreferenceConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.packing import Example
from moe_lm.data.pairs import Pair, PairRows
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.preference import PreferenceObjective, figures, pair_losses
from moe_lm.objective.training_loss import StepCounts, TrainingLoss
from tests.objective.gradients import assert_same_gradients, gradients
from tests.tiny import logits_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PAD, LENGTH, PAIRS = 2, 24, 11
SETTINGS = [{}, {"label_smoothing": 0.2}, {"sft_weight": 0.7}, {"beta": 2.0, "label_smoothing": 0.1, "sft_weight": 0.3}]


def draw_pairs() -> list[Pair]:
    """Prompts of 2 to 5 tokens, answers of 1 to 10; ids are 7 to 63."""
    pairs = []
    for number in range(PAIRS):
        draw = np.random.default_rng(number)
        prompt = draw.integers(7, 64, draw.integers(2, 6))
        sides = []
        for _ in range(2):
            tokens = np.concatenate([prompt, draw.integers(7, 64, draw.integers(1, 11))]).astype(np.int32)
            targets = tokens[1:].copy()
            targets[: len(prompt) - 1] = IGNORE
            sides.append(Example(tokens[:-1], targets))
        pairs.append(Pair(*sides, hash=number))
    return pairs


def build_loss(
    preference: PreferenceConfig, balance: BalanceConfig | None = None, dtype: torch.dtype = torch.float32
) -> TrainingLoss:
    balance = balance or BalanceConfig(bias_update_rate=0, sequence_loss=0)
    return TrainingLoss(tiny_model(seed=3, num_hidden_layers=2), PreferenceObjective(preference), balance, PAD, dtype)


@pytest.fixture
def rows() -> PairRows:
    rows = PairRows(draw_pairs(), LENGTH, PAD)
    rows.set_reference(np.random.default_rng(1).normal(-20, 5, (PAIRS, 2)).astype(np.float32))
    return rows


def log_probs_alone(model: LanguageModel, side: Example) -> Tensor:
    """Log-probabilities of the targets of one answer, in a batch of its own."""
    log_probs = F.log_softmax(logits_of(model, side.input_ids.tolist()), -1)
    return torch.stack([log_probs[n, target] for n, target in enumerate(side.targets.tolist()) if target != IGNORE])


def counts_of(rows: PairRows) -> StepCounts:
    return StepCounts(units=PAIRS, targets=1, tokens=1000, rows=len(rows))


# The formula


def numpy_losses(log_probs: Any, lengths: Any, reference: Any, config: PreferenceConfig) -> Any:
    """Equation 7 of arXiv 2305.18290, with the smoothing of cDPO and the second term of arXiv 2404.19733."""
    ratios = log_probs - reference
    h = config.beta * (ratios[:, 0] - ratios[:, 1])
    epsilon = config.label_smoothing
    losses = (1 - epsilon) * np.log1p(np.exp(-h)) + epsilon * np.log1p(np.exp(h))
    return losses - config.sft_weight * log_probs[:, 0] / lengths[:, 0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_the_papers(settings: dict[str, float]) -> None:
    config, draw = PreferenceConfig(**settings), np.random.default_rng(0)
    log_probs, reference = draw.normal(-30, 8, (2, 40, 2))
    lengths = draw.integers(1, 30, (40, 2)).astype(float)
    found = pair_losses(*map(torch.tensor, (log_probs, lengths, reference)), config)
    np.testing.assert_allclose(found, numpy_losses(log_probs, lengths, reference, config), rtol=1e-10)
    ratios = config.beta * (log_probs - reference)
    margin = ratios[:, 0] - ratios[:, 1]
    assert figures(torch.tensor(log_probs), torch.tensor(reference), config) == pytest.approx({
        "margin": margin.sum(), "accuracy": (margin > 0).sum(),
        "reward_chosen": ratios[:, 0].sum(), "reward_rejected": ratios[:, 1].sum(),
    }, rel=1e-7)  # fmt: skip


def trl_loss(
    loss_types: dict[str, float], config: PreferenceConfig, per_token: Tensor, mask: Tensor, reference: Tensor
) -> Any:
    """The loss of trl's DPOTrainer for log-probabilities [2 pairs, tokens], chosen ones first, and its metrics."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        precompute_ref_logps=True, aux_loss_enabled=False, ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", beta=config.beta, label_smoothing=config.label_smoothing,
        loss_types=list(loss_types), loss_weights=list(loss_types.values()),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    outputs = SimpleNamespace(
        log_probs=per_token * mask, entropy=per_token, mean_logits=per_token, is_top1=per_token > 0, aux_loss=None
    )
    begin = torch.zeros(len(mask), 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([begin, mask.long()], 1),
        "completion_mask": torch.cat([begin, mask.long()], 1),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_trls_on_the_same_log_probabilities(settings: dict[str, float]) -> None:
    """Pair by pair, where trl's mean over a batch's tokens is one over an answer's. Smoothing is its `aot`."""
    config, draw = PreferenceConfig(**settings), torch.Generator().manual_seed(0)
    weights = {"aot" if config.label_smoothing else "sigmoid": 1.0}
    if config.sft_weight:
        weights["sft"] = config.sft_weight
    for _ in range(8):
        per_token = -torch.rand(2, 12, generator=draw, dtype=torch.float64) * 5
        lengths = torch.randint(1, 13, (2, 1), generator=draw)
        mask = torch.arange(12) < lengths
        reference = (per_token * mask).sum(1)[None] + torch.randn(1, 2, generator=draw, dtype=torch.float64) * 3
        log_probs = (per_token * mask).sum(1)[None]
        expected, metrics = trl_loss(weights, config, per_token, mask, reference)
        (found,) = pair_losses(log_probs, lengths.double().T, reference, config)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert figures(log_probs, reference, config) == pytest.approx({
            "margin": metrics["rewards/margins"][0], "accuracy": metrics["rewards/accuracies"][0],
            "reward_chosen": metrics["rewards/chosen"][0], "reward_rejected": metrics["rewards/rejected"][0],
        })  # fmt: skip


# Log-probabilities and the loss of a batch


def test_packed_log_probabilities_are_those_of_every_answer_alone(rows: PairRows) -> None:
    loss = build_loss(PreferenceConfig())
    assert len(rows) < PAIRS / 1.5  # several pairs share a row
    [(pairs, batch)] = rows.in_order(len(rows) + 1)  # and one row is padding
    part = loss(batch, None)
    for place, number in enumerate(pairs):
        for side in range(2):
            alone = log_probs_alone(loss.model, rows.pairs[number].sides[side]).sum()
            assert part.values["log_probs"][place, side].item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_are_the_mean_over_pairs_run_alone(rows: PairRows, settings: dict[str, float]) -> None:
    config = PreferenceConfig(**settings)
    loss = build_loss(config)
    losses = []
    for pair, reference in zip(rows.pairs, torch.from_numpy(rows.reference), strict=True):
        chosen, rejected = (log_probs_alone(loss.model, side) for side in pair.sides)
        h = config.beta * ((chosen.sum() - reference[0]) - (rejected.sum() - reference[1]))
        dpo = (1 - config.label_smoothing) * F.softplus(-h) + config.label_smoothing * F.softplus(h)
        losses.append(dpo - config.sft_weight * chosen.mean())
    expected = torch.stack(losses).mean()
    part = loss(rows.batch(range(len(rows))), counts_of(rows))
    torch.testing.assert_close(part.loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(loss, part.loss), gradients(loss, expected))


def test_a_model_that_is_its_own_reference_loses_log_2(rows: PairRows) -> None:
    loss = build_loss(PreferenceConfig(beta=5.0))
    [(pairs, whole)] = rows.in_order(len(rows))
    rows.reference[pairs] = loss(whole, None).values["log_probs"].numpy()
    part = loss(rows.batch(range(len(rows))), counts_of(rows))
    assert part.loss.item() == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize("sizes", [[1], [2, 3], [4, 2]])
def test_parts_add_up_whatever_the_micro_batches(rows: PairRows, sizes: list[int]) -> None:
    """With every balance loss; a micro-batch may hold only padding, and so no pair."""
    balance = BalanceConfig(sequence_loss=0.3, batch_loss=0.5, z_loss=0.1)
    loss, numbers = build_loss(PreferenceConfig(sft_weight=0.5), balance), list(range(len(rows) + 2))
    counts = replace(counts_of(rows), load=torch.arange(8).expand(len(loss.model.moe_layers), 8))
    whole = loss(rows.batch(numbers), counts)
    left, pieces = iter(numbers), cycle(sizes)
    batches = []
    while piece := list(islice(left, next(pieces))):
        batches.append(rows.batch(piece))
    assert 0 in {batch.num_pairs for batch in batches} or sizes != [1]
    parts = [loss(batch, counts) for batch in batches]
    for name in ("loss", "balance"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert list(whole.sums) == ["loss", "margin", "accuracy", "reward_chosen", "reward_rejected"]
    for name, total in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), total)
    assert_same_gradients(gradients(loss, *(part.loss for part in parts)), gradients(loss, whole.loss))


def test_bfloat16_logits_are_summed_in_float32(rows: PairRows) -> None:
    loss = build_loss(PreferenceConfig(), dtype=torch.bfloat16)
    part = loss(rows.batch(range(len(rows))), counts_of(rows))
    assert {part.values["log_probs"].dtype, part.loss.dtype} == {torch.float32}


def test_what_is_moved_to_a_device_is_all_of_a_batch(rows: PairRows) -> None:
    pairs, batch = next(rows.in_order(2))
    moved = batch.to("meta")
    assert {name for name, value in vars(moved).items() if isinstance(value, Tensor) and not value.is_meta} == set()
    assert isinstance(moved, Batch)
    assert moved.num_pairs == len(pairs)
