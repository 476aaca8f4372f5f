"""Supervised fine-tuning on conversations, all weights. Builds the parts and calls the loop."""

from __future__ import annotations

import yaml

from moe_lm.config import FinetuneConfig, ModelConfig, check_positions
from moe_lm.config_file import build_config
from moe_lm.data.chat import ChatBatches, chat_evaluation_batches, read_chat
from moe_lm.tokenization import Tokenizer
from moe_lm.train import checkpoint
from moe_lm.train.loop import TrainingResult
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
        validation=list(
            chat_evaluation_batches(
                conversations.validation,
                data.sequence_length,
                train.micro_batch_size or train.global_batch_size,
                data.separate_documents,
                tokenizer.pad_id,
            )
        ),
        start_from=start,
        notes=conversations.report.skipped_lines(),
    )
    return run_recipe(recipe)
