"""Fine-tuning on conversations or preference pairs, all weights or adapters. Builds the parts, calls the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import yaml
from rich.console import Console

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.lineage import Start, find_start
from moe_lm.config.model import ModelConfig, check_targets
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig, check_positions, check_router
from moe_lm.data.batches import Batch
from moe_lm.data.examples import ChatExample, ExampleRows, read_chat
from moe_lm.data.packing import RowBatches
from moe_lm.data.pairs import PairRows, read_pairs
from moe_lm.data.preview import show_conversations, show_pairs
from moe_lm.engine.engine import Engine
from moe_lm.objective.preference import Preference
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.topology import current_topology
from moe_lm.parallel.watch import Watchdog
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train import cost
from moe_lm.train.cost import cost_lines
from moe_lm.train.loop import TrainingResult
from moe_lm.train.reference import add_reference
from moe_lm.train.run import Recipe, run_recipe


def run(config: FinetuneConfig, meeting: Meeting | None = None) -> TrainingResult:
    """Fine-tune the model of `config.start_from`, or go on from the newest checkpoint in `config.run_dir`.

    The held-out loss is measured before the first step too. Raises UsageError when the data or the starting point
    cannot be used.
    """
    start = find_start(config)
    tokenizer = Tokenizer.load(checkpoint.verified_path(start.folder, "tokenizer"))
    model = model_of(config, start.folder)
    recipe = supervised if config.preference is None else by_preference
    return run_recipe(recipe(config, start, tokenizer, model), meeting or Meeting(current_topology()))


def supervised(config: FinetuneConfig, start: Start, tokenizer: Tokenizer, model: ModelConfig) -> Recipe:
    """The assistant's words of conversations are learnt."""
    data, train = config.data, config.train
    conversations = read_chat(data, tokenizer)
    rows = ExampleRows(
        conversations.train, data.sequence_length, tokenizer.pad_id, data.separate_documents, bool(data.weights)
    )
    return Recipe(
        title="finetune",
        config=config,
        model=model,
        tokenizer=tokenizer,
        batches=RowBatches(rows, train.global_batch_size, train.seed, data.weights),
        validation=validation_batches(config, conversations.validation, tokenizer),
        objective=NextToken(train.compile),
        start=start,
        lora=config.lora,
        notes=[*conversations.report.skipped_lines(), *_router_lines(config, model), *cost_lines(config, model)],
    )


def by_preference(config: FinetuneConfig, start: Start, tokenizer: Tokenizer, model: ModelConfig) -> Recipe:
    """Of two answers one is made likelier than the other, as seen from the model that training starts from."""
    data, train = config.data, config.train
    assert config.preference is not None
    pairs = read_pairs(data, tokenizer)
    rows, held_out = (
        PairRows(side, data.sequence_length, tokenizer.pad_id) for side in (pairs.train, pairs.validation)
    )

    def with_start(engine: Engine, watchdog: Watchdog) -> list[Batch]:
        size = train.rows_at_once(engine.topology.world_size)
        add_reference((rows, held_out), engine, size, config.run_dir, start, watchdog)
        return at_most(config, (batch for _, batch in held_out.in_order(size)))

    return Recipe(
        title="finetune",
        config=config,
        model=model,
        tokenizer=tokenizer,
        batches=RowBatches(rows, train.global_batch_size, train.seed),
        validation=(),
        objective=Preference(config.preference),
        start=start,
        lora=config.lora,
        with_start=with_start,
        notes=[*pairs.report.skipped_lines(), *_router_lines(config, model), *cost_lines(config, model)],
    )


def _router_lines(config: FinetuneConfig, model: ModelConfig) -> list[str]:
    """Said before the training, not after it when `moe-lm export` refuses what no family has a place for."""
    rate = config.train.balance.bias_update_rate
    if not rate or not model.moe_layers or model.scoring_func != "softmax":
        return []
    return [
        f"train.balance.bias_update_rate={rate} moves router biases, which no family of Hugging Face with a softmax "
        "router has; set it to 0 if the model is to be exported"
    ]


def describe(config: FinetuneConfig) -> str:
    """What `--dry-run` prints; of the starting point it reads the settings alone."""
    return cost.describe(config, model_of(config, find_start(config).folder))


def preview(config: FinetuneConfig, count: int) -> None:
    """Print what would be trained on: the first examples with their loss mask, and figures of all."""
    tokenizer = Tokenizer.load(checkpoint.verified_path(find_start(config).folder, "tokenizer"))
    if config.preference is None:
        show_conversations(Console(), tokenizer, config.data, read_chat(config.data, tokenizer), count)
    else:
        show_pairs(Console(), tokenizer, read_pairs(config.data, tokenizer), count)


def model_of(config: FinetuneConfig, start: Path) -> ModelConfig:
    """The shape of the starting point. Raises UsageError when `config` asks of it what it does not have."""
    values = yaml.safe_load(checkpoint.read_text(start, "model.yaml"))
    model = build_config(ModelConfig, values, f"{start}/model.yaml", saved=True)
    check_positions(model, config.data.sequence_length)
    check_router(model, config.train)
    check_targets(model, config.lora)
    return model


def validation_batches(
    config: FinetuneConfig, conversations: Sequence[ChatExample], tokenizer: Tokenizer
) -> list[Batch]:
    """The held-out conversations, in order."""
    data, size = config.data, config.train.rows_at_once(current_topology().world_size)
    rows = ExampleRows(conversations, data.sequence_length, tokenizer.pad_id, data.separate_documents)
    return at_most(config, (batch for _, batch in rows.in_order(size)))


def at_most(config: FinetuneConfig, batches: Iterator[Batch]) -> list[Batch]:
    """No more than `train.eval_batches` global batches of them."""
    train = config.train
    if train.eval_batches is None:
        return list(batches)
    return list(
        islice(
            batches, train.eval_batches * train.global_batch_size // train.rows_at_once(current_topology().world_size)
        )
    )
