"""Fine-tuning on conversations or preference pairs, of all weights or adapters: its recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.lineage import Start, find_start
from moe_lm.checkpoint.read import read_model_config
from moe_lm.config.model import ModelConfig, check_targets
from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig, check_heads, check_positions, check_router
from moe_lm.data.examples import ChatExample, ExampleRows, read_chat
from moe_lm.data.held_out import HeldOut
from moe_lm.data.packing import PackedRows, RowBatches
from moe_lm.data.pairs import PairRows, read_pairs
from moe_lm.data.preview import show_conversations, show_pairs
from moe_lm.data.records import Splits
from moe_lm.objective.preference import PreferenceObjective
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.topology import Topology, current_topology
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import preflight
from moe_lm.train.cost import cost_lines
from moe_lm.train.result import TrainingResult
from moe_lm.train.run import Recipe, run_recipe
from moe_lm.train.start import notes_on_biases
from moe_lm.train.summary import read_times
from moe_lm.train.timetable import Timetable


def run(
    config: FinetuneConfig,
    meeting: Meeting | None = None,
    fit: preflight.Fit | None = None,
    timetable: Timetable | None = None,
) -> TrainingResult:
    """Fine-tune the model of `config.start_from`, or go on from the newest checkpoint in `config.run_dir`.

    The held-out loss is measured before the first step too. Raises UsageError if the data or the start cannot be used.
    """
    meeting = meeting or Meeting(current_topology())
    start = find_start(config)
    tokenizer = Tokenizer.load(checkpoint.verified_path(start.folder, "tokenizer"))
    model = model_of(config, start.folder)
    preflight.check(config, model, meeting.topology, fit)
    make = supervised if config.preference is None else by_preference
    recipe = make(config, start, tokenizer, model, meeting.topology)
    if recipe.config.train != config.train:  # the data says how many steps, and they how many checkpoints
        preflight.check(recipe.config, model, meeting.topology)
    return run_recipe(replace(recipe, timetable=timetable), meeting)


def supervised(
    config: FinetuneConfig, start: Start, tokenizer: Tokenizer, model: ModelConfig, topology: Topology
) -> Recipe:
    """The recipe of supervised fine-tuning, which learns the assistant's words in conversations."""
    data, train = config.data, config.train
    conversations = read_chat(data, tokenizer)
    rows = example_rows(config, tokenizer, conversations.train)
    held_out = ExampleRows(conversations.validation, data.sequence_length, tokenizer.pad_id, data.separate_documents)
    config = lasting(config, lambda: len(rows))
    batches = RowBatches(rows, train.global_batch_size, train.seed, data.weights)
    said = data_line("conversation", conversations, rows, batches.epochs(config.train.steps))
    return Recipe(
        title="finetune",
        config=config,
        model=model,
        tokenizer=tokenizer,
        objective=NextToken(),
        batches=batches,
        validation=held_out_batches(config, held_out, topology),
        start=start,
        epochs=epochs_by_source(config, batches),
        notes=[said, *conversations.report.skipped_lines(), *_notes(config, model, topology)],
    )


def by_preference(
    config: FinetuneConfig, start: Start, tokenizer: Tokenizer, model: ModelConfig, topology: Topology
) -> Recipe:
    """The recipe of preference tuning, which makes one of two answers likelier than the start does."""
    data, train = config.data, config.train
    pairs = read_pairs(data, tokenizer)
    rows, held_out = (
        PairRows(side, data.sequence_length, tokenizer.pad_id) for side in (pairs.train, pairs.validation)
    )
    preference, config = config.preference, lasting(config, lambda: len(rows))
    batches = RowBatches(rows, train.global_batch_size, train.seed)
    said = data_line("pair", pairs, rows, batches.epochs(config.train.steps))
    assert preference is not None
    return Recipe(
        title="finetune",
        config=config,
        model=model,
        tokenizer=tokenizer,
        objective=PreferenceObjective(preference),
        batches=batches,
        validation=held_out_batches(config, held_out, topology),  # made when they have their reference
        start=start,
        epochs=epochs_by_source(config, batches),
        pairs=(rows, held_out),
        notes=[said, *pairs.report.skipped_lines(), *_notes(config, model, topology)],
    )


def example_rows(config: FinetuneConfig, tokenizer: Tokenizer, examples: Sequence[ChatExample]) -> ExampleRows:
    """Conversations to train on, packed; no row mixes sources that have weights."""
    data = config.data
    return ExampleRows(
        examples, data.sequence_length, tokenizer.pad_id, data.separate_documents, by_source=bool(data.weights)
    )


def data_line(unit: str, data: Splits[Any], rows: PackedRows, epochs: Sequence[float]) -> str:
    """The examples, the rows that they are packed into, how often these are read, and the examples held out."""
    times = read_times(epochs[0]) if len(epochs) == 1 else "each source by its weight"
    held_out = f"{len(data.validation):,} held out" if data.validation else "none held out"
    return f"data            {len(data.train):,} {unit}s in {len(rows):,} rows, {times}; {held_out}"


def epochs_by_source(config: FinetuneConfig, batches: RowBatches) -> dict[str, float]:
    """How often the run reads each source; without weights, the sources are one."""
    names = [source.origin for source in config.data.train] if config.data.weights else ["the training data"]
    return dict(zip(names, batches.epochs(config.train.steps), strict=True))


def _notes(config: FinetuneConfig, model: ModelConfig, topology: Topology) -> list[str]:
    """The cost, after a warning if `moe-lm export` would refuse the trained model."""
    biases = notes_on_biases(config.train.balance, model)
    return [*biases, *cost_lines(config, model, topology)]


def describe(
    config: FinetuneConfig, topology: Topology, fit: preflight.Fit | None = None, settings: bool = False
) -> str:
    """The text of `--dry-run`; of the start it reads only the settings, and the data only if `train.epochs` is set."""
    config = resolved(config)
    return preflight.dry_run(config, model_of(config, find_start(config).folder), topology, fit, settings=settings)


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The config with its length in steps; epochs are those of the packed rows."""

    def num_rows() -> int:
        tokenizer = Tokenizer.load(checkpoint.verified_path(find_start(config).folder, "tokenizer"))
        if config.preference is None:
            return len(example_rows(config, tokenizer, read_chat(config.data, tokenizer).train))
        return len(PairRows(read_pairs(config.data, tokenizer).train, config.data.sequence_length, tokenizer.pad_id))

    return lasting(config, num_rows)


def lasting(config: FinetuneConfig, num_rows: Callable[[], int]) -> FinetuneConfig:
    """The config with its epochs of so many rows as steps."""
    return config.model_copy(update={"train": config.train.with_epochs_as_steps(num_rows)})


def preview(config: FinetuneConfig, count: int) -> None:
    """Print the first examples with their loss mask, and figures of all."""
    tokenizer = Tokenizer.load(checkpoint.verified_path(find_start(config).folder, "tokenizer"))
    if config.preference is None:
        show_conversations(Console(), tokenizer, config.data, read_chat(config.data, tokenizer), count)
    else:
        show_pairs(Console(), tokenizer, read_pairs(config.data, tokenizer), count)


def trained_model(config: RunConfig) -> ModelConfig:
    """The model that a config trains; that of a fine-tuning comes with its start."""
    return config.model if isinstance(config, PretrainConfig) else model_of(config, find_start(config).folder)


def model_of(config: FinetuneConfig, start: Path) -> ModelConfig:
    """The shape of the start. Raises UsageError if `config` asks for something that it does not have."""
    model = read_model_config(start)
    check_positions(model, config.data.sequence_length)
    check_heads(model, config.parallel)
    check_router(model, config.train)
    check_targets(model, config.lora)
    return model


def held_out_batches(config: FinetuneConfig, rows: PackedRows, topology: Topology) -> HeldOut:
    """The rows in order, as many as an evaluation reads."""
    train = config.train
    size = train.rows_at_once(config.parallel.row_groups(topology.world_size))
    limit = train.batches_of_evaluation(config.row_length) * train.global_batch_size // size
    firsts = range(0, len(rows), size)[:limit]
    return HeldOut(lambda first: rows.batch(range(first, first + size)), firsts)
