"""Runs of the trainer that are sick on purpose, each with the alarm that has to come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from moe_lm.config.reading import build_config, dump_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.model.transformer import LanguageModel
from moe_lm.tools.verify.documents import Documents
from tests.loops import LoopRun
from tests.tiny import tiny_model

DOCUMENTS = Documents(seed=1)


@dataclass(frozen=True)
class SickRun:
    """A run of the trainer with one fault, and the alarm that has to come: after how many steps, with which cure."""

    symptom: str
    within: int
    cure: str
    settings: dict[str, Any]
    source: BatchSource = DOCUMENTS
    model: Callable[[], LanguageModel] = lambda: tiny_model(seed=3, num_hidden_layers=2)
    fresh: bool = True
    stops: bool = False  # the guards end it


@dataclass
class SlowDisk:
    """Keeps a step waiting for as long as the step before computed."""

    fingerprint = "slow"

    def __init__(self) -> None:
        self.begun, self.ended = SimpleQueue[float](), math.inf

    def at(self, step: int) -> None:
        """A step begins, and waits."""
        self.begun.put(time.perf_counter())

    def batch(self, step: int, rows: range) -> Batch:
        if step < 100:  # from 100 on: held out
            time.sleep(max(0.01, self.begun.get() - self.ended))
            self.ended = time.perf_counter()
        return DOCUMENTS.batch(step, rows)


@dataclass(frozen=True)
class Repeated:
    """The same four rows in every step."""

    fingerprint: str = "repeated"

    def batch(self, step: int, rows: range) -> Batch:
        return DOCUMENTS.batch(step if step >= 100 else 0, rows)  # from 100 on: held out


@dataclass(frozen=True)
class Strange:
    """The same four rows in every step but one."""

    fingerprint: str = "strange"

    def batch(self, step: int, rows: range) -> Batch:
        return DOCUMENTS.batch(step if step == 24 else 0, rows)


def with_router_bias(experts: list[int], bias: float, **shape: Any) -> LanguageModel:
    """A model whose second MoE layer prefers or avoids these experts, whatever the token."""
    model = tiny_model(seed=3, num_hidden_layers=3, **shape)
    model.moe_layers[1].gate.e_score_correction_bias[experts] = bias
    return model


def leaking_model() -> LanguageModel:
    """A model of which every forward pass leaves two megabytes behind."""
    model, kept = tiny_model(num_hidden_layers=1, n_routed_experts=0), list[Any]()
    model.model.register_forward_hook(lambda *_: kept.append(np.ones(2**18)))
    return model


HEALTHY = SickRun("", 0, "", {"eval_every": 10})
STILL = {"bias_update_rate": 0.0, "sequence_loss": 0.0}
SICK = {
    "rate too high": SickRun(
        "learning rate too high", 20, "train.optimizer.lr at a third", {"optimizer": {"lr": 3.0}},
    ),
    "rate far too high": SickRun(
        "learning rate too high", 20, "train.optimizer.lr at a third", {"optimizer": {"lr": 1000.0}}, stops=True,
    ),
    "rate too low": SickRun(
        "learning rate too low", 210, "Raise train.optimizer.lr",
        {"optimizer": {"lr": 1e-7}, "steps": 210, "global_batch_size": 2},
        model=lambda: tiny_model(seed=2, num_hidden_layers=1, n_routed_experts=0),
    ),
    "NaN in the data": SickRun(
        "not finite", 20, "the rows of these steps", {"poison": lambda step: math.nan if step in (13, 16) else 1.0},
    ),
    "collapsed router": SickRun(
        "collapsed router", 20, "Raise train.balance.bias_update_rate", {"balance": STILL},
        model=lambda: with_router_bias([1, 4, 6], 10.0),
    ),
    "dead experts": SickRun(
        "dead experts", 20, "Raise train.balance.bias_update_rate", {"balance": STILL},
        model=lambda: with_router_bias([1, 4, 5, 7], -10.0, num_experts_per_tok=2), fresh=False,
    ),
    "loss spike": SickRun(
        "loss spike", 30, "Look at the data of that step", {"optimizer": {"lr": 0.01}, "steps": 30}, Strange(),
    ),
    "memorising": SickRun(
        "memorising", 20, "Take the checkpoint of the best step",
        {"optimizer": {"lr": 0.01}, "eval_every": 5}, Repeated(),
    ),
    "starved by data": SickRun(
        "waiting for data", 20, "Copy data.shards to a local disk", {},
        SlowDisk(),
    ),
    "creeping memory": SickRun(
        "creeping memory", 200, "Something keeps", {"steps": 200, "global_batch_size": 1}, model=leaking_model,
    ),
}  # fmt: skip


def run_of(sick: SickRun, folder: Path, **settings: Any) -> LoopRun:
    """The run, which a call starts, in a folder that has a config."""
    settings = {"steps": 20, "schedule": {"warmup_steps": 3}} | sick.settings | settings
    run = LoopRun(folder, sick.source, make_model=sick.model, fresh=sick.fresh, **settings)
    shape = sick.model().config.model_dump(mode="json")
    data = {
        "tokenizer": "tokenizer", "shards": "shards", "sequence_length": 8,
        "sources": [{"name": "documents", "path": "*.txt"}],
    }  # fmt: skip
    values = {
        "run_dir": str(folder), "model": shape, "data": data, "train": run.config.model_dump(mode="json"),
        "start_from": None if sick.fresh else "runs/start",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    text = dump_config(build_config(PretrainConfig, values, "a sick run"))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return run
