"""Opening a corpus of a trillion tokens: seconds and memory of a rank, and of its first and last batches.

    python eval/bench/opening.py [--shards 15625] [--output eval/results/opening.json]

The corpus is forged: sparse files of zeros under a manifest of 64 million tokens and 89,600 documents a shard, so that
it takes no room. Whatever would grow with tokens or documents shows all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_lm.config.data import Phase
from moe_lm.data.batches import PackedBatches
from moe_lm.data.shards import MANIFEST, Manifest, Shard, TokenShards

SHARD_TOKENS, SHARD_DOCUMENTS = 64_000_000, 89_600
SEQUENCE_LENGTH, ROWS_OF_A_RANK, GLOBAL_ROWS = 4096, 2, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=15_625, help="of 64 million tokens each")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        forge(Path(folder), arguments.shards)
        result = measure(Path(folder))
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def forge(folder: Path, count: int) -> None:
    shards = []
    for number in range(count):
        name = f"train-{number:05d}"
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(4 * SHARD_TOKENS)
        shards.append(
            Shard(
                name=name,
                tokens=SHARD_TOKENS,
                documents=SHARD_DOCUMENTS,
                text_bytes=4 * SHARD_TOKENS,
                xxh3_128="0" * 32,
                index_xxh3_128="0" * 32,
            )
        )
    manifest = Manifest(
        made_from={}, tokenizer="forged", vocab_size=100_000, dtype="<u4", bos_id=1, eos_id=2,
        train=tuple(shards), validation=(), skipped={}, examples={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def measure(folder: Path) -> dict[str, object]:
    before = resident_bytes()
    started = time.perf_counter()
    shards = TokenShards.open(folder, "train")
    batches = PackedBatches(
        [shards], [Phase(0, GLOBAL_ROWS, SEQUENCE_LENGTH, (1.0,))], GLOBAL_ROWS, 1, separate_documents=True
    )
    opened = time.perf_counter() - started
    seconds = {}
    for name, step in (("first", 0), ("last", batches.steps_per_epoch - 1)):
        started = time.perf_counter()
        batches.batch(step, range(ROWS_OF_A_RANK))
        seconds[name] = time.perf_counter() - started
    return {
        "tokens": shards.num_tokens,
        "documents": shards.num_documents,
        "shards": len(shards.files),
        "open_seconds": round(opened, 3),
        "first_batch_ms": round(1e3 * seconds["first"], 2),
        "last_batch_ms": round(1e3 * seconds["last"], 2),
        "grown_by_mib": round((resident_bytes() - before) / 2**20),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
