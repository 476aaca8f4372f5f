"""Loader speed: moe_lm's PackedBatches beside the memory-map loop of nanoGPT, in turns on the same tokens.

    python eval/bench/loader.py [--output eval/results/loader.json]

The loop is that of nanoGPT's train.py (`get_batch`), with the map opened once and not for every batch, which is faster
than the original. It draws random windows, shuffles nothing, knows no documents. Ours gives the same two tensors from
a shuffled epoch, and position ids and attention segments beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from moe_lm.config.data import Phase
from moe_lm.data.batches import PackedBatches
from moe_lm.data.marks import Marks
from moe_lm.data.shards import TokenShards
from moe_lm.data.stream import TokenFile

TOKENS = 50_000_000
SEQUENCE_LENGTH, ROWS = 512, 64
DOCUMENT_TOKENS = 600  # on average
ROUNDS, BATCHES_A_ROUND = 40, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        seconds = in_turns(
            {
                "nanogpt_loop": nanogpt_loop(shards),
                "separate_documents": packed(shards, separate_documents=True),
                "across_documents": packed(shards, separate_documents=False),
            }
        )
    result = summary(seconds)
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_shards(folder: Path) -> TokenShards:
    rng = np.random.default_rng(0)
    path = folder / "train-00000.bin"
    tokens = rng.integers(2, 32_000, TOKENS, dtype=np.uint16)
    lengths = 2 + rng.exponential(DOCUMENT_TOKENS, TOKENS // DOCUMENT_TOKENS).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    starts = starts[starts < TOKENS]
    tokens[starts], tokens[starts[1:] - 1] = 0, 1
    tokens.tofile(path)
    return TokenShards(
        folder, "train", (TokenFile(path, tokens.dtype, TOKENS, vocab_size=32_000),), Marks(0, 1), "random"
    )


def nanogpt_loop(shards: TokenShards) -> Callable[[int], object]:
    data, size = np.memmap(shards.folder / "train-00000.bin", np.uint16, "r"), SEQUENCE_LENGTH

    def batch(step: int) -> object:
        ix = torch.randint(len(data) - size, (ROWS,))
        x = torch.stack([torch.from_numpy(data[i : i + size].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + size].astype(np.int64)) for i in ix])
        return x, y

    return batch


def packed(shards: TokenShards, separate_documents: bool) -> Callable[[int], object]:
    batches = PackedBatches(
        [shards], [Phase(0, ROWS, SEQUENCE_LENGTH, (1.0,))], ROWS, seed=0, separate_documents=separate_documents
    )
    return lambda step: batches.batch(step, range(ROWS))


def in_turns(contenders: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds a batch of every round, for each contender; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        for name, batch in contenders.items():
            begin = time.perf_counter()
            for step in range(turn * BATCHES_A_ROUND, (turn + 1) * BATCHES_A_ROUND):
                batch(step)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / BATCHES_A_ROUND)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, object]:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "sequence_length": SEQUENCE_LENGTH,
        "rows": ROWS,
        "median_microseconds_a_batch": {name: round(value * 1e6, 1) for name, value in median.items()},
        "million_tokens_a_second": {
            name: round(SEQUENCE_LENGTH * ROWS / value / 1e6) for name, value in median.items()
        },
        "times_the_loop": {name: round(median["nanogpt_loop"] / value, 1) for name, value in median.items()},
        "rounds": ROUNDS,
        "batches_a_round": BATCHES_A_ROUND,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
