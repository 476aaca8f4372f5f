"""Pretraining, on token shards, from fresh weights or on from those of another model: its recipe."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import TOKENIZER
from moe_lm.checkpoint.lineage import Start
from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.integrity import KINDS, XXH3
from moe_lm.common.process import to_type
from moe_lm.config.model import check_vocabulary
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import BatchSource, EvaluationBatches, PackedBatches
from moe_lm.data.cache import ShardCache
from moe_lm.data.held_out import HeldOut, one_after_the_other
from moe_lm.data.shards import Manifest, Split, TokenShards, damages, is_prepared, manifest_bytes, read_manifest
from moe_lm.engine.build import build_engine, build_model
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.topology import Topology, current_topology
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import preflight
from moe_lm.train.loop import local_micro_batches
from moe_lm.train.phases import phase_lines
from moe_lm.train.result import TrainingResult
from moe_lm.train.run import Recipe, run_recipe
from moe_lm.train.start import find, notes_on
from moe_lm.train.summary import data_lines
from moe_lm.train.timetable import Timetable

WARM_UP_STEPS = 3  # they compile
SPLITS: tuple[Split, Split] = ("train", "validation")


def run(
    config: PretrainConfig,
    meeting: Meeting | None = None,
    fit: preflight.Fit | None = None,
    timetable: Timetable | None = None,
) -> TrainingResult:
    """Train, or go on from the newest checkpoint in `config.run_dir`.

    Raises UsageError, before anything is built, if config, tokenizer, shards and run folder do not fit together.
    """
    meeting = meeting or Meeting(current_topology())
    check_shared(config, meeting)
    config = resolved(config)
    start = find(config)
    preflight.check(config, config.model, meeting.topology, fit)
    tokenizer = load_tokenizer(config)
    recipe = partial(recipe_of, config, tokenizer, start, meeting.topology, timetable)
    opened = recipe(*open_for_training(config, tokenizer, meeting.topology))
    if config.data.verify:
        opened = replace(opened, verified=lambda ranks: recipe(*open_verified(config, tokenizer, ranks)))
    return run_recipe(opened, meeting)


def check_shared(config: PretrainConfig, meeting: Meeting) -> None:
    """Raise UsageError, on every rank and with the host, where a host does not see the shards that rank 0 sees."""
    if meeting.topology.world_size == 1 or storage.is_remote(config.data.shards):
        return
    with meeting.lost_ranks_named():
        meeting.assemble(config.parallel.timeout_seconds)
        manifests = {}
        for source in config.data.sources if meeting.topology.is_first_of_host else ():
            folder = config.data.shards / source.name
            sum_ = KINDS[XXH3](manifest_bytes(folder)).hexdigest() if is_prepared(folder) else ""
            manifests[f"source {source.name}"] = f"manifest {sum_[:12]}" if sum_ else f"no shards in {folder}"
        if difference := meeting.differences(manifests, "shards"):
            cure = "data.shards must be a folder that all hosts share, or a copy on each"
            raise UsageError(f"{difference}; {cure}", common=True)


def recipe_of(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    start: Start | None,
    topology: Topology,
    timetable: Timetable | None,
    shards: Sequence[TokenShards],
    held_out: Sequence[TokenShards],
) -> Recipe:
    """The recipe of a run on these shards."""
    batches = training_batches(config, shards)
    names = [source.name for source in config.data.sources]
    epochs = batches.epochs(config.train.steps) if timetable is None else None  # else time decides
    validation = validation_batches(config, held_out, topology)
    return Recipe(
        title="pretrain",
        config=config,
        model=config.model,
        tokenizer=tokenizer,
        objective=NextToken(),
        batches=batches,
        validation=one_after_the_other(list(validation.values())),
        validation_sources=[(source, len(some)) for source, some in validation.items()],
        start=start,
        epochs=dict(zip(names, epochs or (), strict=False)),
        left_out=[item.left_out for item in (*shards, *held_out) if item.left_out is not None],
        notes=[*data_lines(names, shards, held_out, epochs, config), *notes_on(start, config)],
        timetable=timetable,
    )


def describe(
    config: PretrainConfig, topology: Topology, fit: preflight.Fit | None = None, settings: bool = False
) -> str:
    """The text of `--dry-run`; a tokenizer and shards that are there must fit the model, and the model its start."""
    config = resolved(config)
    start = find(config)
    tokenizer = load_tokenizer(config) if find_tokenizer(config).is_dir() else None
    names = [source.name for source in config.data.sources]
    are_prepared = all(is_prepared(config.data.shards / name) for name in names)
    if are_prepared and tokenizer is None:
        data = [f"data            {config.data.shards} is there, but no tokenizer is in {config.data.tokenizer}"]
    elif tokenizer is None or not are_prepared:
        data = ["data            not prepared yet; moe-lm prepare makes shards with the same config"]
    else:
        shards, held_out = (open_shards(config, split, tokenizer) for split in SPLITS)
        epochs = training_batches(config, shards).epochs(config.train.steps)
        data = list(data_lines(names, shards, held_out, epochs, config))
    data += phase_lines(config)
    data += [
        f"start           {note.removeprefix('starts from ')}"
        for note in ([] if start is None else notes_on(start, config))
    ]
    return preflight.dry_run(config, config.model, topology, fit, data, settings)


def resolved(config: PretrainConfig) -> PretrainConfig:
    """The config with its length in steps. Raises UsageError for epochs of shards that are not there."""
    return config.model_copy(update={"train": config.train.with_epochs_as_steps(lambda: num_windows(config))})


def num_windows(config: PretrainConfig) -> int:
    """The rows of an epoch of all sources together, as the manifests of their shards say."""
    tokens = [sum(shard.tokens for shard in manifest.train) for manifest in read_manifests(config).values()]
    return sum((count - 1) // config.data.sequence_length for count in tokens)


def seconds_per_step(config: PretrainConfig, steps: int = 8, batches: BatchSource | None = None) -> float:
    """The median time of a step once everything is compiled, over a few steps that are thrown away.

    They are on `batches`, or else on the shards.
    """
    pad_id = 0
    if batches is None:
        tokenizer = load_tokenizer(config)
        pad_id = tokenizer.pad_id
        batches = training_batches(config, open_shards(config, "train", tokenizer))
    built = build_model(config.model, config.parallel, current_topology(), precision=config.train.precision)
    built.initialise(config.train.seed)
    objective = NextToken()
    engine = build_engine(built, objective, config.train, config.parallel, pad_id)
    seconds = []
    for step in range(WARM_UP_STEPS + steps):
        micro_batches = local_micro_batches(engine, batches, config.train, step)
        started = time.perf_counter()
        engine.train_step(step, micro_batches)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP_STEPS:])


def load_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The run's tokenizer. Raises UsageError if it is not there, or the model has too few embeddings for it."""
    folder, url = find_tokenizer(config), config.checkpoint.upload_to
    try:
        tokenizer = Tokenizer.load(folder)
    except UsageError as error:
        if folder.exists() or url is None:
            raise
        fetch = to_type("checkpoint", "fetch", url, config.run_dir)
        raise UsageError(f"{error}; if this run is in {url}, its checkpoints have the tokenizer: {fetch}") from error
    check_vocabulary(config.model, tokenizer.vocab_size)
    return tokenizer


def find_tokenizer(config: PretrainConfig) -> Path:
    """The folder of the tokenizer; a run that goes on without it has a copy in its own checkpoint."""
    newest = None if config.data.tokenizer.exists() else checkpoint.latest_readable(config.run_dir / "checkpoints")
    return config.data.tokenizer if newest is None else checkpoint.verified_path(newest, TOKENIZER)


def open_for_training(
    config: PretrainConfig, tokenizer: Tokenizer, topology: Topology
) -> tuple[list[TokenShards], list[TokenShards]]:
    """Both splits of every source. Raises UsageError as `TokenShards.open`.

    Every rank reads the manifests, once. One rank of each host looks at the sizes of the files; all do where damage is
    left out, which changes the order.
    """
    sizes = topology.local_rank == 0 or config.data.on_damage == "leave_out"
    manifests = read_manifests(config)
    train, held_out = (open_shards(config, split, tokenizer, sizes, manifests) for split in SPLITS)
    return train, held_out


def open_verified(
    config: PretrainConfig, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[list[TokenShards], list[TokenShards]]:
    """The same after every byte has been checked, of which each rank reads its share."""
    manifests, found = read_manifests(config), []
    for split in SPLITS:
        damage = [damages_by_shares(folder, split, tokenizer, ranks) for folder in manifests]
        found.append(open_shards(config, split, tokenizer, False, manifests, damage))
    train, held_out = found
    return train, held_out


def damages_by_shares(
    folder: Path,
    split: Split,
    tokenizer: Tokenizer,
    ranks: Ranks,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, str]:
    """What is wrong with the contents of a split, by shard: every rank reads an equal share, and learns of all."""
    share = slice(ranks.rank, None, ranks.size)
    found = ranks.each(lambda: damages(folder, split, tokenizer, True, share, progress), (MoeLmError,))
    return dict(sorted((name, damage) for part in found for name, damage in part.items()))


def open_shards(
    config: PretrainConfig,
    split: Split,
    tokenizer: Tokenizer,
    sizes: bool = True,
    manifests: Mapping[Path, Manifest] | None = None,
    damage: Sequence[Mapping[str, str]] | None = None,
) -> list[TokenShards]:
    """A split of every source. Raises UsageError as `TokenShards.open`.

    `manifests` have been read before, and `damage`, of each source, has been found before.
    """
    manifests = manifests or read_manifests(config)
    known: Sequence[Mapping[str, str] | None] = damage or [None] * len(manifests)
    cache, on_damage = shard_cache(config, manifests), config.data.on_damage
    return [
        TokenShards.open(folder, split, False, tokenizer, on_damage, sizes, found, cache, manifest)
        for (folder, manifest), found in zip(manifests.items(), known, strict=True)
    ]


def read_manifests(config: PretrainConfig) -> dict[Path, Manifest]:
    """The manifest of every source, by its folder."""
    folders = [config.data.shards / source.name for source in config.data.sources]
    return {folder: read_manifest(folder) for folder in folders}


def shard_cache(config: PretrainConfig, manifests: Mapping[Path, Manifest]) -> ShardCache | None:
    """What keeps the shards of a store on the local disk; None for shards that are here."""
    if not storage.is_remote(config.data.shards):
        return None
    sizes = (manifest.tokens * np.dtype(manifest.dtype).itemsize for manifest in manifests.values())
    return ShardCache(config.data.cache_bytes, sum(sizes))


def training_batches(config: PretrainConfig, shards: Sequence[TokenShards]) -> PackedBatches:
    """The training split of every source, mixed by weight."""
    return PackedBatches(
        shards, config.phases, config.train.global_batch_size, config.train.seed, config.data.separate_documents
    )


def validation_batches(config: PretrainConfig, shards: Sequence[TokenShards], topology: Topology) -> dict[str, HeldOut]:
    """The held-out batches of every source that has some, as many of each as an evaluation reads."""
    data, train = config.data, config.train
    size = train.rows_at_once(config.parallel.row_groups(topology.world_size))
    limit = train.batches_of_evaluation(data.sequence_length) * train.global_batch_size // size
    batches: dict[str, HeldOut] = {}
    for name, source in zip((source.name for source in data.sources), shards, strict=True):
        if source.num_tokens > 1:
            held_out = EvaluationBatches(source, data.sequence_length, size, data.separate_documents)
            steps = range(held_out.steps_per_epoch)[:limit]
            batches[name] = HeldOut(partial(held_out.batch, rows=range(size)), steps)
    return batches
