"""Training: guards and rollbacks, the loop with its saves and evaluations, alarms, and the checks before a start."""

from __future__ import annotations

from tests.mutations.frame import Mutation

GUARDS = "train/test_guards.py"
BACK = "train/test_rollbacks.py"
ALARMS = "train/test_alarms.py"
CASES = f"{ALARMS}::test_what_is_said_of_records"
PREFLIGHT = "train/test_preflight.py"
START = "train/test_start.py"
REFUSED_START = f"{START}::test_what_does_not_fit_a_start_is_refused_before_anything_is_built"
CONTINUED = "tools/interop/test_continued.py"
SETTINGS = "train/test_settings.py"
LIMIT = f"{GUARDS}::test_the_limit_is_far_above_the_recent_losses"
INTERRUPTED = f"{BACK}::test_an_interrupted_run_goes_back_as_the_uninterrupted_one"
SO_OFTEN = f"{BACK}::test_a_run_goes_back_only_so_often_and_then_stops_with_its_good_checkpoints"
A_ROW = f"{BACK}::test_a_row_of_skips_goes_back_and_leaves_that_data_out"

MUTATIONS = (
    # Guards
    Mutation(
        "a spike is one of the recent losses",
        "train/guards.py",
        "            memory.spikes += 1\n",
        "            memory.spikes += 1\n            memory.recent = [*memory.recent[1 - RECENT :], result.loss]\n",
        f"{GUARDS}::test_a_spike_is_an_event_and_is_not_one_of_the_recent_losses",
    ),
    Mutation(
        "the deviation is that of the newest losses alone",
        "train/spikes.py",
        "statistics.median(abs(loss - median) for loss in recent)",
        "statistics.median(abs(loss - median) for loss in recent[-10:])",
        LIMIT,
    ),
    Mutation(
        "one rollback more than max_rollbacks",
        "train/guards.py",
        "        if self.memory.rollbacks >= self.config.max_rollbacks:\n",
        "        if self.memory.rollbacks > self.config.max_rollbacks:\n",
        SO_OFTEN,
    ),
    Mutation(
        "a rollback trains on the same data again",
        "train/guards.py",
        'decided = {"rollbacks": rollbacks, "windows": sorted([*apart, window])}',
        'decided = {"rollbacks": rollbacks, "windows": apart}',
        A_ROW,
    ),
    Mutation(
        "what rollbacks left out is read again when the run goes on",
        "train/loop.py",
        '"guard": self.guard.memory.model_dump(),',
        '"guard": self.guard.memory.model_dump(exclude={"windows"}),',
        INTERRUPTED,
    ),
    Mutation(
        "weights are saved without a look whether they are finite",
        "train/loop.py",
        "        if not self.guard.is_sound(self.result.step, state):\n",
        "        if False:\n",
        f"{BACK}::test_a_weight_that_is_not_finite_is_never_saved_and_the_run_goes_back",
    ),
    Mutation(
        "a checkpoint is written in trouble",
        "train/guards.py",
        "        return is_due and not self.trouble\n",
        "        return is_due\n",
        f"{GUARDS}::test_a_spike_is_an_event_and_is_not_one_of_the_recent_losses {A_ROW}",
    ),
    Mutation(
        "a checkpoint that was due in trouble is never written",
        "train/guards.py",
        "        is_due = is_due or self.memory.owes_save\n",
        "",
        f"{GUARDS}::test_a_spike_is_an_event_and_is_not_one_of_the_recent_losses",
    ),
    # The loop
    Mutation(
        "a run that goes on leaves out a step of data",
        "train/loop.py",
        "        self.batches = self.guard.batches(run.batches)\n",
        "        self.batches = self.guard.batches(run.batches)\n"
        "        self.guard.memory.windows += [(self.result.step, self.result.step + 1)] * (self.result.step > 0)\n",
        "train/test_loop.py::test_a_killed_run_goes_on_to_the_same_end",
    ),
    Mutation(
        "early stopping counts one evaluation too few",
        "train/loop.py",
        "result.evaluations_since_best >= patience\n",
        "result.evaluations_since_best >= patience - 1\n",
        "train/test_best.py::test_a_run_ends_early_when_the_held_out_loss_stays_higher",
    ),
    Mutation(
        "the holder of a run folder is named by another pid",
        "train/folder.py",
        '            "pid": os.getpid(),\n',
        '            "pid": os.getppid(),\n',
        "train/test_folder.py::test_a_second_job_is_refused_and_told_who_holds_the_folder",
    ),
    # Alarms
    Mutation(
        "a collapsed router is one whose load is even",
        "train/symptoms.py",
        '        if all(record["experts"][place]["entropy"] < limit for',
        '        if all(record["experts"][place]["entropy"] > limit for',
        CASES,
    ),
    Mutation(
        "a rate too high is one whose loss falls",
        "train/symptoms.py",
        "    lasts = len(past.records) == ROW and loss > limit\n",
        "    lasts = len(past.records) == ROW and loss < limit\n",
        CASES,
    ),
    Mutation(
        "memorising is when both losses rise",
        "train/symptoms.py",
        "now.training < (1 - LEARNED) * before",
        "now.training > (1 - LEARNED) * before",
        CASES,
    ),
    # Before the start
    Mutation(
        "memory that the machine does not have is not missed",
        "train/preflight.py",
        "    if wanted <= there:\n        return None\n",
        "    return None\n",
        f"{PREFLIGHT}::test_what_cannot_run_is_refused_before_anything_is_made",
    ),
    Mutation(
        "a dry run does not look at the layout",
        "train/preflight.py",
        "world_size=processes(config, topology))\n    check_layout(config, topology)\n",
        "world_size=processes(config, topology))\n",
        f"{PREFLIGHT}::test_a_dry_run_refuses_a_layout_that_the_launch_would_refuse",
    ),
    # What a run starts from, and goes on with
    Mutation(
        "a start may have another tokenizer",
        "train/start.py",
        "    if given.fingerprint != own.fingerprint:\n",
        "    if False:\n",
        REFUSED_START,
    ),
    Mutation(
        "a setting of a shape that is not the start's is passed over",
        "train/start.py",
        "        if value != getattr(shape, name):\n",
        "        if False:\n",
        REFUSED_START,
    ),
    Mutation(
        "the moments of the start are forgotten",
        "train/run.py",
        "        load_moments(engine, recipe.start)\n",
        "        pass\n",
        f"{START}::test_the_moments_of_the_start_are_taken_along_when_asked",
    ),
    Mutation(
        "biases move in a family that has no place for them",
        "train/start.py",
        '"balance": with_still_biases(balance)',
        '"balance": balance',
        f"{CONTINUED}::test_a_start_goes_on_resumes_to_the_bit_and_exports",
    ),
    Mutation(
        "a run that goes on forgets the positions of its start",
        "checkpoint/lineage.py",
        'kept["fingerprint"], kept.get("positions"))',
        'kept["fingerprint"])',
        f"{CONTINUED}::test_longer_positions_of_a_start_are_those_of_transformers",
    ),
    Mutation(
        "steps are raised after the decay began",
        "train/settings.py",
        "    if changed is None:\n        return None\n",
        "    return None\n",
        f"{SETTINGS}::test_steps_that_come_too_late_are_refused_with_the_reason",
    ),
    Mutation(
        "changes are allowed for good",
        "train/run.py",
        'update={"allow_changes": False}',
        "update={}",
        f"{SETTINGS}::test_changes_are_allowed_for_one_start_only",
    ),
    # Records, trackers and the report
    Mutation(
        "tokens are counted anew when a run goes on",
        "train/result.py",
        'int(counters.get("tokens", 0))',
        "0",
        "train/test_records.py::test_a_record_says_when_and_after_how_many_tokens_also_after_a_resume",
    ),
    Mutation(
        "a resumed run is another run of its tracker",
        "train/trackers.py",
        "if self.start_step and self.note.is_file() else None",
        "if self.start_step < 0 else None",
        "train/test_trackers.py::test_wandb_stays_one_run_over_resumes",
    ),
    Mutation(
        "a pause counts as training",
        "tools/report/reading.py",
        "            self._time = None\n",
        "",
        "tools/report/test_report.py::test_pauses_are_no_training_and_tokens_go_on",
    ),
    Mutation(
        "a run in a time forgets what comes after its steps",
        "train/timetable.py",
        "(self._ends - now - self._after(seconds))",
        "(self._ends - now)",
        "train/test_timetable.py::test_a_run_ends_in_time_though_the_first_step_compiles",
    ),
    Mutation(
        "an error of the engine is taken for one of the tasks",
        "train/probes.py",
        "            if error is model.error:\n                raise\n",
        "",
        "train/test_probes.py::test_an_error_of_the_tasks_is_an_event_and_training_goes_on",
    ),
)
