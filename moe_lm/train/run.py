"""One training run, in five steps: join the ranks, claim the run folder, build the engine, resume, train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.checkpoint import bucket, checkpoint, lineage, read, retain
from moe_lm.checkpoint.carried import carry_on, is_carrying
from moe_lm.checkpoint.checkpoint import CARRIED, GENERATION
from moe_lm.checkpoint.lineage import ADAPTER, START, Start
from moe_lm.checkpoint.recovery import Found, newest_sound
from moe_lm.checkpoint.write import Content
from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import dump_config
from moe_lm.config.run import FinetuneConfig, RunConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, MixedBatches
from moe_lm.data.pairs import PairRows
from moe_lm.data.shards import LeftOut
from moe_lm.engine.build import build_engine, build_model, rank_device
from moe_lm.engine.engine import Engine
from moe_lm.kernels import kernels
from moe_lm.objective.training_loss import Objective
from moe_lm.parallel import process_group
from moe_lm.parallel.launch import note_start
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.topology import Topology
from moe_lm.parallel.watch import Watchdog, agree
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.alarms import Alarms
from moe_lm.train.checkpoints import Checkpoints, load, report_damage
from moe_lm.train.folder import RunFolder
from moe_lm.train.guards import with_new_settings
from moe_lm.train.log import RunLog, rank_log, rank_log_path
from moe_lm.train.loop import Training, train
from moe_lm.train.past import Plan
from moe_lm.train.phases import flops_of_step, tell_of_phases
from moe_lm.train.probes import Probes
from moe_lm.train.reference import add_reference
from moe_lm.train.result import TrainingResult
from moe_lm.train.settings import changed_settings, flat_settings
from moe_lm.train.start import load_moments
from moe_lm.train.summary import change_of_ranks, closing_lines, opening_lines
from moe_lm.train.timetable import Timetable


@dataclass(frozen=True)
class Recipe:
    """A stage's part of a run: the model and its start, the data, and the objective."""

    title: str
    config: RunConfig
    model: ModelConfig
    tokenizer: Tokenizer
    objective: Objective
    batches: MixedBatches
    validation: Sequence[Batch]  # made when they are evaluated, after the reference has been added to `pairs`
    validation_sources: Sequence[tuple[str, int]] = ()  # of `validation`, in order, and how many batches are of each
    start: Start | None = None  # the model to begin with; None: fresh weights
    pairs: Sequence[PairRows] = ()  # of preference tuning: they need the log-probabilities of the start
    epochs: Mapping[str, float] = field(default_factory=dict)  # over the whole run, by source
    left_out: Sequence[LeftOut] = ()  # of the data, because it is damaged
    notes: Sequence[str] = ()  # about data and cost, said at the start
    timetable: Timetable | None = None  # fits the steps to a time, in a single process
    verified: Callable[[Ranks], Recipe] | None = None  # the same, after the ranks have read all data

    def kept_config(self, train: TrainConfig | None = None) -> str:
        """The config that a run keeps, without what was allowed for this one start; with other steps, if they moved."""
        config = self.config
        settings = config.checkpoint.model_copy(update={"allow_changes": False})
        return dump_config(config.model_copy(update={"checkpoint": settings, "train": train or config.train}))


def run_recipe(recipe: Recipe, meeting: Meeting) -> TrainingResult:
    """Train to the last step, from the newest checkpoint of the run folder if there is one.

    Raises UsageError if the run folder was made with another config, tokenizer or data, MoeLmError if another process
    trains in it, or `log.eval_tasks` cannot be had.
    """
    if recipe.timetable is not None:
        train = recipe.config.train.model_copy(update={"schedule": recipe.timetable.config.schedule})
        recipe = replace(recipe, config=recipe.config.model_copy(update={"train": train}))
    probes = Probes.of(recipe.config, recipe.tokenizer)
    with meeting.lost_ranks_named():
        topology = join_ranks(recipe, meeting)
        watchdog = Watchdog(
            recipe.config.parallel.timeout_seconds, meeting, rank_log_path(topology, recipe.config.run_dir)
        )
        with watchdog:
            recipe = verify_data(recipe, watchdog)
            with claim_folder(recipe, meeting, watchdog) as claim:
                recipe = with_start_in(recipe, claim.found.folder)
                with build_and_fill(recipe, topology) as engine:
                    watchdog.follow(engine.exchange)
                    counters = resume(recipe, engine, watchdog, claim.found.folder)
                    return train_and_log(recipe, engine, watchdog, counters, claim, probes)


def join_ranks(recipe: Recipe, meeting: Meeting) -> Topology:
    """Meet the other ranks, and check that all of them are about to do the same."""
    parallel = recipe.config.parallel
    if meeting.topology.world_size == 1:
        return meeting.topology
    device = rank_device(parallel, meeting.topology)
    if device.type == "cuda":
        process_group.record_flight(recipe.config.run_dir / "logs")
    meeting.assemble(parallel.timeout_seconds)
    settings = dict(flat_settings(recipe.config.model_dump(mode="json")))
    fingerprints = {"the tokenizer": recipe.tokenizer.fingerprint, "the data": recipe.batches.fingerprint}
    agree(meeting, settings | fingerprints)
    process_group.join(meeting, device, parallel.timeout_seconds)
    return meeting.topology


def verify_data(recipe: Recipe, watchdog: Watchdog) -> Recipe:
    """The recipe without the data that is found damaged, where its contents are to be checked at the start."""
    if recipe.verified is None:
        return recipe
    with watchdog.patiently("verifying"):
        ranks = Ranks.with_own_group(watchdog.patience_seconds)
        recipe = recipe.verified(ranks)
        ranks.close()
    return recipe


class Claim(NamedTuple):
    """The run folder, the checkpoint in it to go on from, and the settings that differ from that checkpoint's."""

    folder: RunFolder  # held by rank 0
    found: Found
    changes: list[str]
    fetched: list[str]  # what was fetched from the store of the checkpoints, for the user


@contextmanager
def claim_folder(recipe: Recipe, meeting: Meeting, watchdog: Watchdog) -> Iterator[Claim]:
    """Hold the run folder, with the checkpoint that it lacks and a store has, and keep this rank's log."""
    config, start, is_main = recipe.config, recipe.start, meeting.topology.is_main
    folder, url = RunFolder(config.run_dir), config.checkpoint.upload_to
    if url is not None:
        check_store(url, watchdog)
    with ExitStack() as stack:
        with meeting.lost_ranks_named():
            Ranks().first(partial(enter, folder, stack), (MoeLmError,))  # refused on every rank alike
        stack.enter_context(rank_log(meeting.topology, config.run_dir))
        stack.enter_context(meeting.lost_ranks_named())
        fetched = [] if url is None else fetch_newer(folder, url, watchdog)
        found = newest_sound(folder.checkpoints, config.checkpoint.on_damage)
        changes = changed_settings(found.folder, config, recipe.tokenizer, recipe.batches, start)
        if is_main:
            retain.clean(folder.checkpoints, config.checkpoint)
            if start is not None and config.lora is not None:
                checkpoint.pin(start.folder, f"the base of the adapters in {config.run_dir.absolute()}")
        yield Claim(folder, found, changes, fetched)


def check_store(url: str, watchdog: Watchdog) -> None:
    """Raise StorageError unless checkpoints can be written there; a run that this ends leaves no folder."""
    with watchdog.patiently("loading"), closing(Ranks.with_own_group(watchdog.patience_seconds)) as ranks:
        ranks.first(lambda: storage.check_writable(url, "checkpoint.upload_to"), (MoeLmError,))


def fetch_newer(folder: RunFolder, url: str, watchdog: Watchdog) -> list[str]:
    """Bring the newest checkpoint back from a store; returns what to say of it. Raises StorageError."""
    with watchdog.patiently("loading"), closing(Ranks.with_own_group(watchdog.patience_seconds)) as ranks:
        step, damaged = bucket.bring_back(folder.checkpoints, url, ranks)
    said = [f"warning: a checkpoint of {url} was passed over: {damage}" for damage in damaged]
    return said if step is None else [*said, f"fetched the checkpoint of step {step} from {url}"]


def enter(folder: RunFolder, stack: ExitStack) -> None:
    stack.enter_context(folder)


def with_start_in(recipe: Recipe, newest: Path | None) -> Recipe:
    """The recipe with the shape and tokenizer of the run's own sound checkpoint, if it has them from one of its own."""
    start = recipe.start
    if start is None or newest is None or start.folder.parent != newest.parent:
        return recipe
    return replace(recipe, start=start._replace(folder=newest))


@contextmanager
def build_and_fill(recipe: Recipe, topology: Topology) -> Iterator[Engine]:
    """The engine around the model with the weights of step 0: drawn from the seed, or those of the start."""
    config, parallel, adapters = recipe.config.train, recipe.config.parallel, recipe.config.lora
    built = build_model(recipe.model, parallel, topology, adapters, config.freeze_router, precision=config.precision)
    if recipe.start is None:
        built.initialise(config.seed)
    elif built.divided:
        built.fill(read.open_weights(recipe.start.folder, built.tensors()))
        built.initialise_adapters(config.seed)
    else:
        read.load_weights(recipe.start.folder, built.tensors())
        built.initialise_adapters(config.seed)
    engine = build_engine(built, recipe.objective, config, parallel, recipe.tokenizer.pad_id)
    try:
        yield engine
    except MoeLmError as error:
        if error.common or topology.world_size == 1:  # closing waits for the other ranks, which may not have failed
            engine.close()
        raise
    engine.close()


def resume(recipe: Recipe, engine: Engine, watchdog: Watchdog, newest: Path | None) -> dict[str, Any]:
    """Load the checkpoint to go on from and return its trainer.json; empty if there is none.

    The reference of preference tuning is computed before, while the engine has the weights of the start.
    """
    if recipe.pairs:
        assert recipe.start is not None
        batch_size = recipe.config.train.rows_at_once(engine.topology.row_groups)
        add_reference(recipe.pairs, engine, batch_size, recipe.config.run_dir, recipe.start, watchdog)
    watchdog.at("loading")
    if newest is None and recipe.start is not None and recipe.config.start_with_optimizer:
        load_moments(engine, recipe.start)
    counters = load(engine, newest)
    note_start(counters.get("step", 0))
    return counters


def train_and_log(
    recipe: Recipe,
    engine: Engine,
    watchdog: Watchdog,
    counters: dict[str, Any],
    claim: Claim,
    probes: Probes | None = None,
) -> TrainingResult:
    """Open the log and call the loop."""
    config, is_main = recipe.config, engine.topology.is_main
    if probes is not None and not recipe.validation:
        raise UsageError(
            "log.sample_prompts and log.eval_tasks belong to evaluations, and there is no held-out data to evaluate; "
            "set data.validation_fraction, or take them out",
            common=True,
        )
    folder, found, changes, fetched = claim
    start_step = counters.get("step", 0)
    if changes:
        counters = with_new_settings(counters)
    is_new = is_main and folder.write_config(recipe.kept_config())
    finetuning = isinstance(config, FinetuneConfig)
    alarms = Alarms(Plan(config.train, recipe.model, recipe.start is None, recipe.epochs, finetuning))
    settings = dict(flat_settings({**config.model_dump(mode="json"), "model": recipe.model.model_dump(mode="json")}))
    with RunLog(
        config.run_dir, config.log, config.train.steps, recipe.title, start_step, is_main, alarms, settings
    ) as log:
        for line in fetched:
            log.message(line)
        report_damage(log, found, start_step)
        report_losses(log, recipe.left_out, start_step)
        log.event(
            "start", start_step, f"begins after step {start_step} of {config.train.steps}", show=False,
            processes=engine.topology.world_size, fresh=recipe.start is None, epochs=recipe.epochs,
            start_from=None if recipe.start is None else str(recipe.start.origin),
            model=recipe.model.model_dump(mode="json"),
        )  # fmt: skip
        is_timed = recipe.timetable is not None
        for line in opening_lines(recipe.title, config, recipe.model, engine, recipe.notes, start_step, is_timed):
            log.message(line)
        if changed := change_of_ranks(counters.get("processes"), config.train, engine.topology):
            log.message(changed)
        log.message(f"kernels: {kernels.of(engine.model)}")
        if config.parallel.attention_kernel == "auto":
            for note in kernels.passed_over(engine.model):
                log.message(note)
        if is_new or not start_step:
            log.emit(alarms.at_start(start_step))
        if changes:
            log.message(f"with other settings than before, as checkpoint.allow_changes allows: {'; '.join(changes)}")
        training = Training(
            engine=engine,
            batches=recipe.batches,
            validation=recipe.validation,
            validation_sources=recipe.validation_sources,
            probes=probes,
            config=config.train,
            checkpoints=Checkpoints(
                folder.checkpoints,
                config.checkpoint,
                engine,
                log,
                files=files_of_run(recipe),
                keep_lock=lambda: Ranks().first(folder.keep_lock, (MoeLmError,)),
                watchdog=watchdog,
            ),
            log=log,
            flops_per_token=flops_of_step(config, recipe.model),
            before_step=tell_of_phases(config, log),
            leave_out=recipe.batches.leave_out,
            evaluate_first=recipe.start is not None,
            watchdog=watchdog,
            timetable=recipe.timetable,
            kept_config=recipe.kept_config if is_timed else None,
        )
        result = train(training, counters)
        if recipe.timetable is not None:
            folder.write_config(recipe.kept_config(recipe.timetable.config))
        elif not result.stopped:
            for line in closing_lines(recipe.title, config, result):
                log.message(line)
        return result


def report_losses(log: RunLog, left_out: Iterable[LeftOut], step: int) -> None:
    """An event for every split of which damaged shards are left out."""
    for loss in left_out:
        log.event(
            "data_left_out", step, f"warning: {loss}", source=loss.folder.name, split=loss.split,
            shards=sorted(loss.damage), tokens=loss.tokens, share=loss.tokens / loss.of_tokens,
        )  # fmt: skip


def files_of_run(recipe: Recipe) -> dict[str, Content]:
    """The files beside the tensors of every checkpoint of the run, by name."""
    files: dict[str, Content] = {
        "config.yaml": recipe.kept_config(),
        "model.yaml": dump_config(recipe.model),
        "data.sha256": recipe.batches.fingerprint,
        **{f"tokenizer/{name}": text for name, text in recipe.tokenizer.files().items()},
    }
    if recipe.start is not None:
        folder, lora = recipe.start.folder, recipe.config.lora
        if lora is None:
            files[START] = recipe.start.describe()
            if is_carrying(folder):
                files[CARRIED] = carry_on(folder, Path(recipe.config.run_dir) / "checkpoints")
        else:
            files[ADAPTER] = lineage.describe_adapter(folder, lora)
        if (folder / GENERATION).is_file():
            files[GENERATION] = checkpoint.read_text(folder, GENERATION)
    return files
