"""Trace one optimizer step of a tiny Mixture of Experts: the files it visits, in order, and the functions in each.

`python docs/trace_step.py` runs a step in a single process on the CPU, as `moe-lm pretrain` does, and prints what the
interpreter calls. It exits with 1 if more than MAX_FILES files of moe_lm take part, or if a call goes upwards in the
import contract of pyproject.toml. docs/tour.md shows its output.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from textwrap import fill
from types import FrameType
from typing import Any

import numpy as np
import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, pack
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_lm"
MAX_FILES = 12
ROWS, LENGTH, VOCABULARY = 4, 16, 64


class Trace:
    """The functions of moe_lm that are called, by file in the order of the first visit, and the calls upwards."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.upwards: list[str] = []
        self._floors = floors()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        callee = file_of(frame) if event == "call" else None
        if callee is None:
            return
        functions = self.files.setdefault(callee, [])
        name = frame.f_code.co_qualname.split(".<")[0]  # a comprehension is part of its function
        if name not in functions:
            functions.append(name)
        caller = caller_of(frame)
        if caller is not None and self._floor(callee) < self._floor(caller):
            self.upwards.append(f"{caller} calls {name} of {callee}")

    def _floor(self, file: str) -> int:
        return self._floors[file.split("/")[0].removesuffix(".py")]


def file_of(frame: FrameType) -> str | None:
    """The file that a frame's code stands in, below moe_lm/; None for other code."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def caller_of(frame: FrameType) -> str | None:
    """The nearest file of moe_lm in the stack below a call; torch may stand in between."""
    caller = frame.f_back
    while caller is not None and file_of(caller) is None:
        caller = caller.f_back
    return None if caller is None else file_of(caller)


def floors() -> dict[str, int]:
    """The floor of every room in the import contract, counted from the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (walk,) = (c for c in settings["tool"]["importlinter"]["contracts"] if c.get("containers") == ["moe_lm"])
    rooms = [re.findall(r"\w+", names) for names in walk["layers"]]
    found = {room: floor for floor, names in enumerate(rooms) for room in names}
    # A kernel was put in the place of one of the model's operations: the model calls its own attribute.
    return found | {"kernels": found["model"]}


def tiny_engine() -> Engine:
    """An engine as `moe-lm pretrain` builds it on a CPU."""
    model = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1,
    )  # fmt: skip
    train = TrainConfig(steps=10, global_batch_size=ROWS, micro_batch_size=ROWS // 2, precision="float32")
    parallel = ParallelConfig(device="cpu", attention_kernel="segments")  # which runs on every CPU
    built = build_model(model, parallel, Topology())
    built.initialise(seed=0)
    return build_engine(built, NextToken(), train, parallel, pad_id=0)


def micro_batches() -> list[Batch]:
    """Two micro-batches of random tokens, a document in each row."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, ROWS // 2, LENGTH + 1))
    bounds = np.arange(0, ROWS // 2 * LENGTH + 1, LENGTH)
    return [pack(rows[:, :-1].copy(), rows[:, 1:].copy(), bounds) for rows in tokens]


def main() -> None:
    torch.set_num_threads(1)
    engine, batches, trace = tiny_engine(), micro_batches(), Trace()
    engine.train_step(0, batches)  # some things are set up in the first one
    sys.setprofile(trace)
    engine.train_step(1, batches)
    sys.setprofile(None)
    for number, (file, functions) in enumerate(trace.files.items(), 1):
        print(fill(", ".join(functions), 120, initial_indent=f"{number:2} {file:27}", subsequent_indent=" " * 30))
    for call in dict.fromkeys(trace.upwards):
        print(f"upwards: {call}", file=sys.stderr)
    if len(trace.files) > MAX_FILES:
        print(f"{len(trace.files)} files, expected at most {MAX_FILES}", file=sys.stderr)
    sys.exit(1 if trace.upwards or len(trace.files) > MAX_FILES else 0)


if __name__ == "__main__":
    main()
