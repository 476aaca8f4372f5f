"""One training run on disk: takes the run folder, builds the engine, resumes, calls the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from moe_lm.checkpoint import checkpoint, lineage, read
from moe_lm.checkpoint.lineage import START, Start
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.reading import build_config, dump_config
from moe_lm.config.run import RunConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.engine.build import PlacedModel, build_engine, place_model, rank_device
from moe_lm.engine.engine import Engine
from moe_lm.kernels.kernels import Kernels
from moe_lm.model.size import flops_per_token
from moe_lm.objective.training_loss import Objective
from moe_lm.parallel.launch import end_with_launcher
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join
from moe_lm.parallel.watch import Watchdog, agree
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.folder import RunFolder, compare_config, flat_settings
from moe_lm.train.log import RunLog, rank_log
from moe_lm.train.loop import Training, TrainingResult, resume, train

# Settings that say how a run is watched, kept and fitted to its machine, not what it computes: they may change when it
# goes on.
MAY_CHANGE = (
    "log.", "checkpoint.", "parallel.", "train.eval_", "train.micro_batch_size", "train.activation_checkpointing",
    "train.compile", "data.workers", "run_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What one stage trains, on what, from where."""

    title: str
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    batches: BatchSource
    validation: Sequence[Batch]
    objective: Objective
    start: Start | None = None  # a model to begin with; None: fresh weights
    lora: LoraConfig | None = None  # train adapters beside these weights
    # What needs the model of the start, while it is there: gives the held-out batches, in place of `validation`.
    with_start: Callable[[Engine, Watchdog], Sequence[Batch]] | None = None
    notes: Sequence[str] = ()  # what the person should know of the data, said at the start


def run_recipe(recipe: Recipe, meeting: Meeting) -> TrainingResult:
    """Train to the last step, from the newest checkpoint of the run folder when there is one.

    Raises UsageError when the run folder was made with another config or tokenizer, MoeLmError when another process
    trains in it.
    """
    config = recipe.config
    folder = RunFolder(config.run_dir)
    if meeting.topology.world_size > 1:
        end_with_launcher()
        join(meeting, rank_device(config.parallel, meeting.topology), config.parallel.timeout_seconds)
    topology = meeting.topology
    is_main = topology.is_main
    settings = dict(flat_settings(config.model_dump(mode="json")))
    agree(topology, settings | {"the tokenizer": recipe.tokenizer.fingerprint, "the data": recipe.batches.fingerprint})
    here = folder if is_main else nullcontext()
    with here, rank_log(topology, Path(config.run_dir)), meeting.lost_ranks_named():
        changes = check_unchanged(recipe, folder.checkpoints)
        if is_main:
            checkpoint.clean(folder.checkpoints, config.checkpoint.keep)
            if recipe.start is not None and recipe.lora is not None:
                checkpoint.pin(recipe.start.folder, f"the base of the adapters in {config.run_dir.absolute()}")
        placed = place_model(recipe.model, config.parallel, topology, recipe.lora, config.train.freeze_router)
        fill(placed, recipe)
        engine = build_engine(placed, recipe.objective, config.train, config.parallel, recipe.tokenizer.pad_id)
        watchdog = Watchdog(config.parallel.timeout_seconds if topology.world_size > 1 else None)
        try:
            result = train_with(engine, recipe, folder, watchdog, changes, placed.kernels)
        except MoeLmError as error:
            if error.common or topology.world_size == 1:  # a rank that is alone with its error cannot wait for others
                engine.close()
            raise
        finally:
            watchdog.stop()
        engine.close()
        return result


def train_with(
    engine: Engine, recipe: Recipe, folder: RunFolder, watchdog: Watchdog, changes: Sequence[str], kernels: Kernels
) -> TrainingResult:
    """Resume when there is a checkpoint, whose settings differ in `changes`; open the log, call the loop."""
    config = recipe.config
    validation = recipe.validation if recipe.with_start is None else recipe.with_start(engine, watchdog)
    step = resume(engine, folder.checkpoints)
    if engine.topology.is_main:
        folder.write_config(dump_config(config))
    with (
        RunLog(config.run_dir, config.log, config.train.steps, recipe.title, step, engine.topology.is_main) as log,
        TemporaryDirectory() as scratch,
    ):
        for note in [f"going on after step {step} of {config.train.steps}"] if step else recipe.notes:
            log.message(note)
        log.message(f"kernels: {kernels}")
        if changes:
            log.message(f"with other settings than before, as checkpoint.allow_changes allows: {'; '.join(changes)}")
        recipe.tokenizer.save(Path(scratch) / "tokenizer")
        files: dict[str, str | Path] = {
            "config.yaml": dump_config(config),
            "model.yaml": dump_config(recipe.model),
            "data.sha256": recipe.batches.fingerprint,
            "tokenizer": Path(scratch) / "tokenizer",
            **_of_the_start(recipe),
        }
        parts = Training(
            engine=engine,
            batches=recipe.batches,
            validation=validation,
            config=config.train,
            checkpoint=config.checkpoint,
            checkpoints=folder.checkpoints,
            log=log,
            watchdog=watchdog,
            files=files,
            evaluate_first=recipe.start is not None,
            flops_per_token=flops_per_token(recipe.model, config.data.sequence_length, causal_half=True),
        )
        return train(parts, step)


def _of_the_start(recipe: Recipe) -> dict[str, str]:
    """Which model the run began with, and what an imported one says of generating, for those trained from it."""
    if recipe.start is None:
        return {}
    name, folder = "generation_config.json", recipe.start.folder
    carried = {name: checkpoint.read_text(folder, name)} if (folder / name).is_file() else {}
    if recipe.lora is None:
        return {**carried, START: recipe.start.describe()}
    return {**carried, lineage.ADAPTER: lineage.describe_adapter(folder, recipe.lora)}


def fill(placed: PlacedModel, recipe: Recipe) -> None:
    """The weights of step 0: drawn by the seed, or those of the start."""
    if recipe.start is None:
        placed.initialise(recipe.config.train.seed)
    else:
        read.load_weights(recipe.start.folder, placed.tensors())
        placed.initialise_adapters(recipe.config.train.seed)


def check_unchanged(recipe: Recipe, checkpoints: Path) -> list[str]:
    """What differs from the settings, tokenizer and data of the newest checkpoint, when changes are allowed.

    Raises UsageError with them when they are not.
    """
    folder = checkpoint.latest(checkpoints)
    if folder is None:
        return []
    changes = compare_config(_as_now(folder, recipe.config), recipe.config.model_dump(mode="json"))
    may_change: tuple[str, ...] = MAY_CHANGE
    adapter = lineage.read_adapter(folder)
    if adapter and recipe.start and recipe.start.fingerprint == adapter.fingerprint:
        may_change += ("start_from",)  # the same base, wherever it lies now
    changes = [change for change in changes if not change.startswith(may_change)]
    if Tokenizer.load(checkpoint.verified_path(folder, "tokenizer")).fingerprint != recipe.tokenizer.fingerprint:
        changes.append("the tokenizer is another one")
    if checkpoint.read_text(folder, "data.sha256") != recipe.batches.fingerprint:
        changes.append("the training data is other data, which would repeat and skip tokens")
    if changes and not recipe.config.checkpoint.allow_changes:
        raise UsageError(
            f"{recipe.config.run_dir} holds a run with other settings ({'; '.join(changes)}); "
            "set run_dir to a new folder, take the changes back, or go on with them: checkpoint.allow_changes=true"
        )
    return changes


def _as_now(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The config that a checkpoint was trained with; a setting that is younger has its default."""
    values: dict[str, Any] = yaml.safe_load(checkpoint.read_text(folder, "config.yaml"))
    try:
        return build_config(type(config), values, f"{folder}/config.yaml", saved=True).model_dump(mode="json")
    except UsageError:  # another stage's, or with a setting that is gone
        return values
