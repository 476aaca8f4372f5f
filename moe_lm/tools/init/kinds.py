"""The settings that one usually touches, by what one wants to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.config.section import Section

Values = dict[str, Any]


class Wanted(NamedTuple):
    """What a config is written for: folder, data, the model to begin with, and the longest row that it reads."""

    kind: str
    folder: str
    data: str
    start: str
    most_positions: int

    @property
    def run_dir(self) -> str:
        return f"{self.folder}/{self.kind}"

    @property
    def length(self) -> int:
        return min(512, self.most_positions)


class Kind(NamedTuple):
    """A kind of config: its class, the verb that takes it, what that does, and its settings."""

    config: type[Section]
    verb: str
    does: str
    values: Callable[[Wanted], Values]


def pretrain(wanted: Wanted) -> Values:
    """The frame of a pretraining, to which init.py adds the sizes."""
    return {
        "run_dir": wanted.run_dir,
        "model": {},
        "data": {
            "sources": [{"name": "text", "path": wanted.data}],
            "tokenizer": f"{wanted.folder}/tokenizer",
            "shards": f"{wanted.folder}/shards",
            "validation_fraction": 0.05,
            "sequence_length": 256,
        },
        "train": {
            "steps": 0,
            "global_batch_size": 16,
            "micro_batch_size": None,
            "optimizer": {"name": "muon", "lr": 1.2e-2, "muon_lr": 0.02, "weight_decay": 0.01},
            "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.6, "min_ratio": 0.02},
            "balance": {"bias_update_rate": 0.01},
            "precision": "auto",
            "compile": False,
            "eval_every": 100,
            "eval_batches": 8,
        },
        **surroundings(every=200),
    }


def surroundings(every: int) -> Values:
    """Where a run computes, what it keeps and what it reports."""
    return {
        "parallel": {"device": "auto"},
        "checkpoint": {"every": every, "keep": 2, "best": True},
        "log": {"every": 10, "trackers": []},
    }


def continued(wanted: Wanted) -> Values:
    return {
        "run_dir": wanted.run_dir,
        "start_from": wanted.start,
        "start_with_optimizer": False,
        "data": {
            "sources": [{"name": "text", "path": wanted.data}],
            "shards": f"{wanted.folder}/shards",
            "validation_fraction": 0.05,
            "sequence_length": wanted.length,
        },
        "train": {
            "epochs": 2,
            "global_batch_size": 16,
            "micro_batch_size": None,
            "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.1},
            "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.2, "min_ratio": 0.1},
            "eval_every": 100,
            "eval_batches": 8,
        },
        **surroundings(every=200),
    }


def finetune(wanted: Wanted, lr: float = 5e-5, **more: Values) -> Values:
    return {
        "run_dir": wanted.run_dir,
        "start_from": wanted.start,
        **more,
        "data": {
            "train": [wanted.data],
            "validation_fraction": 0.05,
            "sequence_length": wanted.length,
            "truncate": "skip",
        },
        "train": {
            "epochs": 3,
            "global_batch_size": 16,
            "micro_batch_size": None,
            "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": 10, "min_ratio": 0.1},
            "eval_every": 20,
            "early_stopping": None,
        },
        **surroundings(every=200),
    }


def lora(wanted: Wanted) -> Values:
    return finetune(wanted, lr=5e-4, lora={"rank": 16, "alpha": 32, "dropout": 0.0, "targets": None})


def dpo(wanted: Wanted) -> Values:
    values = finetune(wanted, lr=5e-6, preference={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0})
    values["train"]["epochs"] = 1
    return values


def tokenizer(wanted: Wanted) -> Values:
    return {
        "output": f"{wanted.folder}/tokenizer",
        "vocab_size": 32768,
        "sources": [{"name": "text", "path": wanted.data}],
        "validation_fraction": 0.05,
    }


KINDS = {
    "pretrain": Kind(PretrainConfig, "pretrain", "trains a model from fresh weights", pretrain),
    "continue": Kind(PretrainConfig, "pretrain", "trains a model on with more text", continued),
    "finetune": Kind(FinetuneConfig, "finetune", "teaches a model to answer, all of its weights", finetune),
    "lora": Kind(FinetuneConfig, "finetune", "teaches a model to answer, by small adapters beside its weights", lora),
    "dpo": Kind(FinetuneConfig, "finetune", "makes a model prefer one of two answers", dpo),
    "tokenizer": Kind(TokenizerRecipe, "tokenizer train", "trains a tokenizer", tokenizer),
}
