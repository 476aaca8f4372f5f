"""What a run says of itself: before its first step what it trains, on what and where; at its end what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from moe_lm.common import storage
from moe_lm.common.process import this_command, to_type
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig, PretrainConfig, RunConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.data.cache import StoredTokenFile
from moe_lm.data.shards import TokenShards
from moe_lm.engine.engine import Engine
from moe_lm.model.size import count_parameters
from moe_lm.optim.groups import first_other_rate
from moe_lm.parallel.topology import Topology
from moe_lm.train.result import TrainingResult

MOST_HELD_OUT = 0.1  # of a source, without a remark


def opening_lines(
    title: str,
    config: RunConfig,
    model: ModelConfig,
    engine: Engine,
    notes: Iterable[str],
    start_step: int,
    is_timed: bool = False,
) -> Iterator[str]:
    """What a run says before its first step: the model, the steps, the place, its notes, and where it goes on.

    The steps of a run that `is_timed` are as many as its time allows.
    """
    steps = config.train.steps
    if 0 < steps <= start_step:
        more = to_type("init", "TEXT", "--for", "continue", "--start-from", config.run_dir)
        if first_other_rate(start_step, steps, 2 * steps, config.train.schedule) is None:
            more = longer(this_command(), steps)
        yield f"this run is finished: all {steps} steps are done; for more: {more}"
        return
    parameters = count_parameters(model)
    yield f"{title} in {config.run_dir}: {parameters.total:,} parameters, {parameters.active:,} active a token"
    tokens = config.train.global_batch_size * config.row_length
    length = f"as many steps of {tokens:,} tokens as there is time for, at most {steps:,}"
    yield f"{length if is_timed else steps_line(config, parameters.total)}; {place(config, engine)}"
    yield from notes
    if config.train.optimizer.name == "muon":  # whose rate no step reports
        yield f"optimizer       {rates_line(config.train.optimizer)}"
    if config.checkpoint.upload_to is not None:
        yield f"checkpoints     copied to {config.checkpoint.upload_to} as they are saved"
    if start_step:
        yield f"going on after step {start_step}" + ("" if is_timed else f" of {steps}")


def change_of_ranks(before: int | None, train: TrainConfig, topology: Topology) -> str | None:
    """What another number of processes than `before` changes; checkpoints of older versions do not know theirs."""
    if before in (None, topology.world_size):
        return None
    rows = len(topology.rows_of(train.global_batch_size))
    here = "1 process" if topology.world_size == 1 else f"{topology.world_size} processes"
    return f"{here} instead of {before}: the same {train.global_batch_size} rows a step, {rows} of them on each"


def longer(command: str, steps: int) -> str:
    """The same command for a run twice as long, in the unit in which it says the length."""
    given = re.search(r" (?:--)?train\.(?:tokens|epochs)[= ]([0-9.]+(?:e[0-9]+)?)(?=[A-Za-z]?(?: |$))", command)
    if given is not None:
        return f"{command[: given.start(1)]}{2 * float(given[1]):.12g}{command[given.end(1) :]}"
    return re.sub(r" (--)?train\.(steps|tokens|epochs)[= ]\S+", "", command) + f" train.steps={2 * steps}"


def steps_line(config: RunConfig, parameters: int) -> str:
    """Steps and tokens of a run: `300 steps of 4,096 tokens (16 rows of 256): 1,228,800 tokens, 0.12 a parameter`."""
    rows, length = config.train.global_batch_size, config.row_length
    tokens = config.train.steps * rows * length
    return (
        f"{config.train.steps:,} steps of {rows * length:,} tokens ({rows:,} rows of {length:,}): {tokens:,} tokens, "
        f"{tokens / parameters:.2g} a parameter"
    )


def place(config: RunConfig, engine: Engine) -> str:
    """Where a run computes: device, number format, processes, and how these divide the work."""
    here = f"on {engine.device.type} in {str(engine.dtype).removeprefix('torch.')}"
    parts = layout_parts(config.parallel, engine.topology.world_size)
    return ", ".join([here, *parts[engine.topology.world_size == 1 :]])


def layout_parts(parallel: ParallelConfig, size: int) -> list[str]:
    """So many processes, and what divides the work over them."""
    parts = ["1 process" if size == 1 else f"{size} processes"]
    if parallel.engine == "deepspeed":
        parts.append(f"DeepSpeed with ZeRO {parallel.zero_stage or 1}")
    if parallel.expert_parallel_size > 1:
        parts.append(f"experts over {parallel.expert_parallel_size} processes")
    if parallel.sequence_parallel_size > 1:
        parts.append(f"rows over {parallel.sequence_parallel_size} processes")
    return parts


def rates_line(optimizer: OptimizerConfig) -> str:
    """The optimizer with its peak learning rates."""
    if optimizer.name == "muon":
        return f"muon: muon_lr={optimizer.muon_lr:g} for hidden matrices; adamw: lr={optimizer.lr:g} for all else"
    return f"{optimizer.name}: lr={optimizer.lr:g}"


def data_lines(
    names: Sequence[str],
    train: Sequence[TokenShards],
    held_out: Sequence[TokenShards],
    epochs: Sequence[float] | None,
    config: PretrainConfig,
) -> Iterator[str]:
    """A line for each source: its tokens, how often they are read (if that is known), and how many are held out.

    Where they are more than an evaluation reads by default, it says how many those are.
    """
    rows, length = config.train.global_batch_size, config.row_length
    evaluated = config.train.batches_of_evaluation(length) * rows * length
    times = [f", {read_times(each)}" for each in epochs] if epochs is not None else [""] * len(names)
    for name, read, kept, often in zip(names, train, held_out, times, strict=True):
        share = kept.num_tokens / max(1, read.num_tokens + kept.num_tokens)
        line = f"data            {name}: {read.num_tokens:,} tokens{often}; "
        line += f"{kept.num_tokens:,} held out ({share:.1%})" if kept.num_tokens else "none held out"
        if config.train.eval_batches is None and kept.num_tokens > evaluated:
            line += f", of which an evaluation reads {evaluated:,} (train.eval_batches)"
        much = ", which is much: a lower piece_bytes or data.validation_fraction holds out less"
        yield line + (much if share > MOST_HELD_OUT else "")
    files = [file for source in (*train, *held_out) for file in source.files if isinstance(file, StoredTokenFile)]
    if any(not file.cache.keeps_files for file in files):
        size = sum(len(file) * file.dtype.itemsize for file in files)
        yield (
            f"data            {storage.text_of(config.data.shards)} has {size:,} bytes, more than data.cache_bytes="
            f"{config.data.cache_bytes:,}: windows are read there one by one, and nothing is kept here"
        )


def read_times(epochs: float) -> str:
    return f"read {epochs:.1f} times" if epochs >= 1 else f"of which the run reads {epochs:.1%}"


def closing_lines(title: str, config: RunConfig, result: TrainingResult) -> Iterator[str]:
    """What a finished run says: whether it ended early, which checkpoint is the best, and what to type next."""
    train, run_dir = config.train, config.run_dir
    if result.step < train.steps:
        yield result.ended_early()
    if result.best is not None:
        folder = run_dir / "checkpoints" / f"step-{result.best.step:08d}"
        kept = folder if folder.is_dir() else "its checkpoint was not kept; checkpoint.best=true keeps it"
        yield f"lowest held-out loss: {result.best.loss:.4f} after step {result.best.step} ({kept})"
        if result.validation_loss is not None and result.best.step < result.step:
            yield (
                f"the last step is not the best: its held-out loss is {result.validation_loss:.4f}, and {run_dir} "
                "means its last checkpoint" + (f"; name {folder} to use the best" if folder.is_dir() else "")
            )
    yield f"next: {', '.join(to_type(*words) for words in next_commands(title, config))}"


def next_commands(title: str, config: RunConfig) -> tuple[tuple[str, ...], ...]:
    """The words of each."""
    run = str(config.run_dir)
    sample, export = ("sample", run, "--prompt", "TEXT"), ("export", run, "OUT")
    if title == "finetune":
        return ("chat", run), export  # it has no held-out text for `eval`
    if config.start_from is not None:
        return sample, ("eval", run), export
    return sample, ("eval", run), ("finetune", "CONFIG", f"start_from={run}")
