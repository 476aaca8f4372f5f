"""Illnesses that no file and no signal can cause: patches of a started program, run before its first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def saves_raise() -> None:
    """Writing a checkpoint raises an error that is not the disk's."""
    from moe_lm.checkpoint import write

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the saving thread broke")

    write.save = broken


def poisoned_loss() -> None:
    """The loss of the steps FROM to UNTIL (counted from 1) is multiplied by FACTOR, on rank RANK or on all."""
    first, last, factor = int(os.environ["FROM"]), int(os.environ["UNTIL"]), float(os.environ["FACTOR"])
    if os.environ.get("ONLY_RANK", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return

    def poison(step: int, parts: Any) -> Any:
        if first <= step + 1 <= last:
            sums = {**parts.sums, "loss": parts.sums["loss"] * factor}
            return parts._replace(loss=parts.loss * factor, sums=sums)
        return parts

    _after_forward(poison)


def _after_forward(change: Callable[[int, Any], Any]) -> None:
    """Change the loss parts of every forward pass of a training step."""
    from moe_lm.engine.engine import Engine
    from moe_lm.objective.training_loss import TrainingLoss

    now = {"step": -1}
    train_step, forward = Engine.train_step, TrainingLoss.forward

    def stepping(engine: Any, step: int, *arguments: Any, **named: Any) -> Any:
        now["step"] = step
        return train_step(engine, step, *arguments, **named)

    def forwarding(loss: Any, *arguments: Any, **named: Any) -> Any:
        parts = forward(loss, *arguments, **named)
        return change(now["step"], parts) if loss.training else parts

    Engine.train_step, TrainingLoss.forward = stepping, forwarding  # type: ignore[method-assign]


def slow_evaluation() -> None:
    """Every evaluation batch takes 200 ms; the file BEGUN is there when the first has begun."""
    import time
    from pathlib import Path

    from moe_lm.engine.engine import Engine

    evaluate = Engine.evaluate

    def slowly(engine: Any, batches: Any) -> Any:
        if "BEGUN" in os.environ:
            Path(os.environ["BEGUN"]).touch()
        time.sleep(0.2)
        return evaluate(engine, batches)

    Engine.evaluate = slowly  # type: ignore[method-assign]


def ignores_hang_up() -> None:
    """Started by nohup, which ignores SIGHUP."""
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def two_experts_take_all() -> None:
    """Router biases that send every token to experts 0 and 1; prints the gradients of the others at every step."""
    import torch

    from moe_lm.engine.engine import Engine

    train_step = Engine.train_step

    def stepping(engine: Any, step: int, batches: Any, on_gradients: Any = None, **named: Any) -> Any:
        for layer in engine.model.moe_layers:
            layer.gate.e_score_correction_bias[:2] = 100.0

        def look() -> None:
            if on_gradients is not None:
                on_gradients()
            for name, gradient in engine.gradients().items():
                if ".experts." in name and int(os.environ.get("RANK", "0")) == 1:
                    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                    print("gradient of idle experts", float(torch.as_tensor(local).abs().max()), flush=True)

        return train_step(engine, step, batches, look, **named)

    Engine.train_step = stepping  # type: ignore[method-assign]


def poisoned_data() -> None:
    """The batches of the steps FROM to UNTIL of the data (counted from 1) give a loss that is not a number."""
    import math

    from moe_lm.data import batches
    from moe_lm.engine.engine import Engine

    first, last = int(os.environ["FROM"]), int(os.environ["UNTIL"])
    now = {"bad": False}
    source = batches.PackedBatches
    batch, train_step = source.batch, Engine.train_step

    def reading(self: Any, step: int, *arguments: Any, **named: Any) -> Any:
        found = batch(self, step, *arguments, **named)
        found.cu_seqlens.data_step = step  # which is read before the step that it is for
        return found

    def stepping(engine: Any, step: int, micro_batches: Any, *arguments: Any, **named: Any) -> Any:
        now["bad"] = first <= micro_batches[0].cu_seqlens.data_step + 1 <= last
        return train_step(engine, step, micro_batches, *arguments, **named)

    source.batch, Engine.train_step = reading, stepping  # type: ignore[method-assign]

    def poison(_: int, parts: Any) -> Any:
        if not now["bad"]:
            return parts
        sums = {**parts.sums, "loss": parts.sums["loss"] * math.nan}
        return parts._replace(loss=parts.loss * math.nan, sums=sums)

    _after_forward(poison)


def poisoned_weight() -> None:
    """A weight becomes NaN before step FROM (counted from 1), once, as a faulty memory would do it."""
    import math

    import torch

    from moe_lm.engine.engine import Engine

    train_step, done = Engine.train_step, []

    def stepping(engine: Any, step: int, *arguments: Any, **named: Any) -> Any:
        if step + 1 == int(os.environ["FROM"]) and not done:
            done.append(step)
            with torch.no_grad():
                next(engine.model.parameters()).view(-1)[0] = math.nan
        return train_step(engine, step, *arguments, **named)

    Engine.train_step = stepping  # type: ignore[method-assign]


def small_shards() -> None:
    """Shards of 50,000 tokens, so that a small corpus has several."""
    from moe_lm.text import pieces

    pieces.SMALLEST = 100_000


def limited_memory() -> None:
    """At most 3 GB more of address space than now, most of which is for the stacks of threads."""
    import resource
    from pathlib import Path

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000_000, resource.RLIM_INFINITY))
