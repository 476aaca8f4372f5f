"""Preference tuning by direct preference optimisation (DPO, arXiv 2305.18290).

Shapes: P pairs; [P, 2] holds the preferred answer of each first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_lm.config.training import PreferenceConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.objective.training_loss import Predictions, Score


class PreferenceObjective:
    """The objective of preference tuning: the units are pairs."""

    def __init__(self, config: PreferenceConfig) -> None:
        self._config = config

    def units(self, batch: Batch) -> int:
        return batch.num_pairs

    def score(self, predictions: Predictions, batch: Batch) -> Score:
        assert batch.reference is not None
        log_probs_P2, lengths_P2 = answer_log_probs(predictions.nll(batch.targets), batch)
        losses_P = pair_losses(log_probs_P2, lengths_P2, batch.reference, self._config)
        log_probs_P2 = log_probs_P2.detach()
        return Score(losses_P.sum(), figures(log_probs_P2, batch.reference, self._config), {"log_probs": log_probs_P2})


def answer_log_probs(nll_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every answer, in nats and float32, and its number of target tokens: [P, 2] each."""
    assert batch.answers is not None
    answers_T, answers = batch.answers.flatten(), 2 * batch.num_pairs
    sums = nll_BS.new_zeros(answers + 1)  # the last one takes the tokens outside any answer
    log_probs = sums.index_add(0, answers_T, -nll_BS.flatten())
    lengths = sums.index_add(0, answers_T, (batch.targets.flatten() != IGNORE).float())
    return log_probs[:answers].view(-1, 2), lengths[:answers].view(-1, 2)


def pair_losses(log_probs_P2: Tensor, lengths_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> Tensor:
    """Equation 7 of the paper: minus the log-sigmoid of the margin, [P].

    `label_smoothing` is the share of pairs that count as labelled the wrong way round (cDPO). `sft_weight` adds the
    preferred answer's negative log-likelihood per token, with this weight (arXiv 2404.19733, equation 2).
    """
    chosen_P, rejected_P = rewards(log_probs_P2, reference_P2, config).unbind(-1)
    margin_P = chosen_P - rejected_P
    smoothing = config.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
    if config.sft_weight:
        losses = losses - config.sft_weight * log_probs_P2[:, 0] / lengths_P2[:, 0]
    return losses


def rewards(log_probs_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> Tensor:
    """Implicit reward of every answer: beta times its log-ratio to the reference."""
    return config.beta * (log_probs_P2 - reference_P2)


def figures(log_probs_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> dict[str, Tensor]:
    """Figures for the log, summed over the pairs. A pair with equal rewards counts as wrong."""
    chosen_P, rejected_P = rewards(log_probs_P2, reference_P2, config).unbind(-1)
    margin_P = chosen_P - rejected_P
    return {
        "margin": margin_P.sum(),
        "accuracy": (margin_P > 0).float().sum(),
        "reward_chosen": chosen_P.sum(),
        "reward_rejected": rejected_P.sum(),
    }
