"""Scheduled sampling (arXiv 1506.03099), in the two passes that a Transformer needs (arXiv 1906.07651).

In the input, a share of the tokens that are also targets is replaced by the model's own predictions of them. The
targets stay the true ones, so the model learns to go on from its own mistakes. This file chooses the places; the
training loss makes the first pass, which has no gradient.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lm.config.training import ScheduledSamplingConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.order import shuffle_key


def with_own_tokens(batch: Batch, config: ScheduledSamplingConfig, seed: int, step: int, rows: range) -> Batch:
    """The batch of these rows of global step `step`, with the places that take the model's own token.

    A pure function of (seed, step, row, position): every layout and a resumed run choose the same places.
    """
    share = share_of(step, config)
    chosen = torch.from_numpy(_uniform(seed, step, rows, batch.input_ids.shape[1]) < share)
    return replace(batch, own_tokens=chosen & is_target_prefix(batch))


def share_of(step: int, config: ScheduledSamplingConfig) -> float:
    """The share at step `step` (counted from 0); it grows linearly over the first `ramp_steps`."""
    return config.share * min(1.0, step / config.ramp_steps) if config.ramp_steps else config.share


def is_target_prefix(batch: Batch) -> Tensor:
    """Whether an input token was the target of the position before it, [rows, sequence] bool."""
    before = batch.targets[:, :-1]
    found = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    found[:, 1:] = (before != IGNORE) & (before == batch.input_ids[:, 1:])
    found.view(-1)[batch.cu_seqlens[:-1]] = False  # the first of a document
    return found


def mixed(batch: Batch, likeliest_BS: Tensor) -> Batch:
    """The batch of the second pass: the chosen places hold the likeliest token given everything before them."""
    assert batch.own_tokens is not None
    input_ids = batch.input_ids.clone()
    input_ids[:, 1:] = torch.where(batch.own_tokens[:, 1:], likeliest_BS[:, :-1], input_ids[:, 1:])
    return replace(batch, input_ids=input_ids, own_tokens=None)


def _uniform(seed: int, step: int, rows: range, length: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), [rows, length]."""
    row, position = np.asarray(rows)[:, None], np.arange(length)[None]
    return (shuffle_key(seed, step, row, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53
