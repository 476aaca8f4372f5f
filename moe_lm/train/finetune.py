"""Supervised fine-tuning on conversations, all weights. Builds the parts and calls the loop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import yaml

from moe_lm.config import FinetuneConfig, check_positions
from moe_lm.config_file import build_config
from moe_lm.data.batches import Batch
from moe_lm.data.chat import ChatBatches, Conversation, chat_evaluation_batches, read_chat
from moe_lm.model_config import ModelConfig
from moe_lm.parallel.topology import current_topology
from moe_lm.tokenization import Tokenizer
from moe_lm.train import checkpoint
from moe_lm.train.loop import TrainingResult, rows_at_once
from moe_lm.train.run import Recipe, run_recipe


def run(config: FinetuneConfig, title: str = "finetune") -> TrainingResult:
    """Fine-tune the model of `config.start_from`, or go on from the newest checkpoint in `config.run_dir`.

    The held-out loss is measured before the first step too. Raises UsageError when the conversations or the
    starting point cannot be used.
    """
    start = checkpoint.resolve(config.start_from)
    tokenizer = Tokenizer.load(checkpoint.verified_path(start, "tokenizer"))
    model = build_config(ModelConfig, yaml.safe_load(checkpoint.read_text(start, "model.yaml")), f"{start}/model.yaml")
    check_positions(model, config.data.sequence_length)
    data, train = config.data, config.train
    conversations = read_chat(data, tokenizer)
    shape = (data.sequence_length, train.global_batch_size)
    recipe = Recipe(
        title=title,
        config=config,
        model=model,
        tokenizer=tokenizer,
        batches=ChatBatches(conversations.train, *shape, train.seed, data.separate_documents, tokenizer.pad_id),
        validation=validation_batches(config, conversations.validation, tokenizer),
        start_from=start,
        notes=conversations.report.skipped_lines(),
    )
    return run_recipe(recipe)


def validation_batches(
    config: FinetuneConfig, conversations: Sequence[Conversation], tokenizer: Tokenizer
) -> list[Batch]:
    """The held-out conversations, in order; at most `train.eval_batches` global batches of them."""
    data, train = config.data, config.train
    size = rows_at_once(current_topology(), train)
    batches = chat_evaluation_batches(
        conversations, data.sequence_length, size, data.separate_documents, tokenizer.pad_id
    )
    if train.eval_batches is not None:
        batches = islice(batches, train.eval_batches * train.global_batch_size // size)
    return list(batches)
