"""The reference of preference tuning: the log-probability of every answer under the weights that training starts from.

It is computed once, before the first step, by the model of the run in its own layout, so that there is no second copy
of the model. A run that goes on reads it from its folder, or computes it again from `start_from`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from moe_lm.checkpoint.lineage import Start, lost_reference
from moe_lm.common.files import whole_file
from moe_lm.data.batches import Batch
from moe_lm.data.pairs import PairRows
from moe_lm.engine.engine import Engine
from moe_lm.parallel.process_group import Ranks, all_reduce_sum
from moe_lm.parallel.watch import Watchdog

FILE = "reference.safetensors"


def add_reference(
    rows: Sequence[PairRows], engine: Engine, batch_size: int, run_dir: Path, start: Start, watchdog: Watchdog
) -> None:
    """Give the pairs the log-probabilities of their answers under the engine's model, which is the start of the run.

    They are read from `run_dir` if it has those of the same pairs and the same `start`. Every rank calls this; only
    rank 0 reads and writes. Raises UsageError if the run folder has none and the start is gone.
    """
    key = hashlib.sha256(",".join([start.fingerprint, *(item.fingerprint for item in rows)]).encode()).hexdigest()
    pairs = [len(item.pairs) for item in rows]
    kept = Ranks().first(lambda: _read(run_dir / FILE, key, sum(pairs)), ())
    if kept is None and not start.is_origin:
        raise lost_reference(start)
    if kept is None and engine.topology.is_main:
        print(f"computing the reference: log-probabilities of {2 * sum(pairs):,} answers under the start", flush=True)
    found = kept
    if found is None:
        found = np.concatenate([log_probs(engine, item, batch_size, watchdog) for item in rows])
    for item, values in zip(rows, np.split(found, np.cumsum(pairs)[:-1]), strict=True):
        item.set_reference(values)
    if kept is None:
        with suppress(OSError):  # a full disk: it is computed again when the run goes on
            if engine.topology.is_main:
                _write(run_dir / FILE, key, found)


def log_probs(engine: Engine, rows: PairRows, batch_size: int, watchdog: Watchdog) -> NDArray[np.float32]:
    """Log-probabilities of every answer under the engine's model, in nats: [pairs, 2]."""
    found = np.zeros((len(rows.pairs), 2), np.float32)
    batches = rows.in_order(batch_size)
    while share := list(islice(batches, engine.topology.row_groups)):
        watchdog.at("reference")
        order = [pair for pairs, _ in share for pair in pairs]
        found[order] = gather_log_probs(engine, [batch for _, batch in share]).numpy()
    return found


def gather_log_probs(engine: Engine, batches: Sequence[Batch]) -> Tensor:
    """Log-probabilities of the answers of all pairs, in the order of the batches: [pairs, 2] on the host."""
    bounds = [0, *accumulate(batch.num_pairs for batch in batches)]
    found = torch.zeros(bounds[-1], 2, device=engine.device)
    for share in engine.forward_shares(batches):
        if share.is_own:
            found[bounds[share.number] : bounds[share.number + 1]] = share.parts.values["log_probs"]
    return all_reduce_sum(found).cpu()


def _read(path: Path, key: str, pairs: int) -> NDArray[np.float32] | None:
    """The log-probabilities in a file; None if it is absent, damaged or of another key."""
    try:
        with safe_open(path, "numpy") as file:
            found: NDArray[np.float32] = file.get_tensor("log_probs")
            about = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return found if about.get("sha256") == _digest(key, found) and found.shape == (pairs, 2) else None


def _write(path: Path, key: str, found: NDArray[np.float32]) -> None:
    with whole_file(path) as file:
        file.write_bytes(save({"log_probs": found}, {"sha256": _digest(key, found)}))


def _digest(key: str, found: NDArray[np.float32]) -> str:
    return hashlib.sha256(key.encode() + found.tobytes()).hexdigest()
