"""Checking the contents of every shard of a config, on all cores, and over the ranks that a launcher starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.storage import StorageError
from moe_lm.config.run import PretrainConfig
from moe_lm.data.shards import MANIFEST, Manifest, read_manifest
from moe_lm.parallel import process_group
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.topology import current_topology
from moe_lm.parallel.watch import Watchdog
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.pretrain import SPLITS, damages_by_shares, load_tokenizer


def run(
    config: PretrainConfig, meeting: Meeting | None, progress: Callable[[int, int | None], object]
) -> Iterator[tuple[str, dict[str, str]]]:
    """What was looked at, and what is wrong with its shards, by name: source by source and split by split.

    Each rank reads an equal share of the shards and learns what all have found. `progress` is told of the tokens that
    this rank has read, and of how many it will. A source whose manifest is missing or damaged comes first, as damaged.
    """
    meeting = meeting or Meeting(current_topology())
    tokenizer, timeout = load_tokenizer(config), config.parallel.timeout_seconds
    with meeting.lost_ranks_named():
        if meeting.topology.world_size > 1:
            process_group.join(meeting, torch.device("cpu"), timeout)
        with Watchdog(timeout, meeting) as watchdog, watchdog.patiently("verifying"):
            yield from _by_split(config, tokenizer, Ranks.with_own_group(watchdog.patience_seconds), progress)


def _by_split(
    config: PretrainConfig, tokenizer: Tokenizer, ranks: Ranks, progress: Callable[[int, int | None], object]
) -> Iterator[tuple[str, dict[str, str]]]:
    manifests: dict[Path, Manifest] = {}

    def read_manifests() -> dict[Path, str]:
        unread = {}
        for folder in (config.data.shards / source.name for source in config.data.sources):
            try:
                manifests[folder] = read_manifest(folder)
            except StorageError:
                raise
            except UsageError as error:
                unread[folder] = str(error)
        return unread

    damaged: dict[Path, str] = {}
    for found in ranks.each(read_manifests, (MoeLmError,)):
        damaged |= found  # a source that one rank cannot read, no rank does
    for folder, sentence in damaged.items():
        manifests.pop(folder, None)
        yield storage.text_of(folder), {MANIFEST: sentence}
    share, done = slice(ranks.rank, None, ranks.size), 0
    total = sum(shard.tokens for item in manifests.values() for split in SPLITS for shard in item.shards(split)[share])

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    for folder, manifest in manifests.items():
        for split in SPLITS:
            if shards := manifest.shards(split):
                damage = damages_by_shares(folder, split, tokenizer, ranks, read)
                tokens = sum(shard.tokens for shard in shards)
                number = f"{len(shards)} {split} shard{'s' * (len(shards) != 1)}"
                yield f"{storage.text_of(folder)}: {number}, {tokens:,} tokens", damage
