"""Checking the contents of every shard of a config, on all cores, and over the ranks that a launcher starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import PretrainConfig
from moe_lm.data.shards import damages, read_manifest
from moe_lm.parallel import process_group
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.topology import current_topology
from moe_lm.train.pretrain import SPLITS, load_tokenizer


def run(
    config: PretrainConfig, meeting: Meeting | None, progress: Callable[[int, int | None], object]
) -> Iterator[tuple[str, dict[str, str]]]:
    """What was looked at, and what is wrong with its shards, by name: source by source and split by split.

    Each rank reads an equal share of the shards and learns what all have found. `progress` is told of the tokens that
    this rank has read, and of how many it will. Raises UsageError for a folder without a sound manifest.
    """
    meeting = meeting or Meeting(current_topology())
    tokenizer = load_tokenizer(config)
    if meeting.topology.world_size > 1:
        process_group.join(meeting, torch.device("cpu"), config.parallel.timeout_seconds)
    ranks, done = Ranks(), 0
    share = slice(ranks.rank, None, ranks.size)
    folders = [config.data.shards / source.name for source in config.data.sources]
    manifests = [read_manifest(folder) for folder in folders]
    total = sum(shard.tokens for item in manifests for split in SPLITS for shard in item.shards(split)[share])

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    with meeting.lost_ranks_named():
        for folder, manifest in zip(folders, manifests, strict=True):
            for split in SPLITS:
                if shards := manifest.shards(split):
                    found = ranks.each(
                        lambda folder=folder, split=split: damages(folder, split, tokenizer, True, share, read),  # type: ignore[misc]
                        (MoeLmError,),
                    )
                    tokens = sum(shard.tokens for shard in shards)
                    yield (
                        f"{folder}: {len(shards)} {split} shards, {tokens:,} tokens",
                        {name: why for part in found for name, why in part.items()},
                    )
