"""Direct preference optimisation (DPO, arXiv 2305.18290): what it minimises and shows, out of log-probabilities.

Shapes: P pairs, and of each the preferred answer first: [P, 2].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.config.training import PreferenceConfig
from moe_lm.data.batches import IGNORE, Batch

FIGURES = ("margin", "accuracy", "reward_chosen", "reward_rejected")  # means over the pairs


def answer_log_probs(logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every answer the log-probability in nats, in float32, and the number of its target tokens: [P, 2] each."""
    assert batch.answers is not None
    nll_T = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    answers_T, answers = batch.answers.flatten(), 2 * batch.num_pairs
    sums = nll_T.new_zeros(answers + 1)  # one more, for tokens of no answer
    log_probs = sums.index_add(0, answers_T, -nll_T)
    lengths = sums.index_add(0, answers_T, (batch.targets.flatten() != IGNORE).float())
    return log_probs[:answers].view(-1, 2), lengths[:answers].view(-1, 2)


def pair_losses(log_probs_P2: Tensor, lengths_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> Tensor:
    """Equation 7 of the paper: minus the log-sigmoid of the margin, [P].

    With `label_smoothing` that share of the pairs counts as labelled the wrong way round (cDPO). With `sft_weight` the
    preferred answer's negative log-likelihood a token is added, so weighted (arXiv 2404.19733, equation 2).
    """
    chosen_P, rejected_P = rewards(log_probs_P2, reference_P2, config).unbind(-1)
    margin_P = chosen_P - rejected_P
    smoothing = config.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)
    if config.sft_weight:
        losses = losses - config.sft_weight * log_probs_P2[:, 0] / lengths_P2[:, 0]
    return losses


def rewards(log_probs_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> Tensor:
    """What the policy implies that every answer is worth: beta times the log-ratio to the reference."""
    return config.beta * (log_probs_P2 - reference_P2)


def figure_sums(log_probs_P2: Tensor, reference_P2: Tensor, config: PreferenceConfig) -> Tensor:
    """FIGURES, summed over the pairs. A pair whose answers are worth the same counts as wrong."""
    chosen_P, rejected_P = rewards(log_probs_P2, reference_P2, config).unbind(-1)
    margin_P = chosen_P - rejected_P
    return torch.stack([figure.sum() for figure in (margin_P, (margin_P > 0).float(), chosen_P, rejected_P)])
