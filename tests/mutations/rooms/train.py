"""Training: guards and rollbacks, the loop with its saves and evaluations, alarms, and the checks before a start."""

from __future__ import annotations

from tests.mutations.frame import Mutation

GUARDS = "train/test_guards.py"
BACK = "train/test_rollbacks.py"
ALARMS = "train/test_alarms.py"
CASES = f"{ALARMS}::test_what_is_said_of_records"
PREFLIGHT = "train/test_preflight.py"
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
        "skipped steps apart from each other count as a row",
        "train/guards.py",
        "memory.skipped_in_row + 1 if result.skipped else 0\n",
        "memory.skipped_in_row + result.skipped\n",
        f"{GUARDS}::test_many_skips_are_all_events_and_do_not_flood_the_terminal",
    ),
    Mutation(
        "a loss that stays out of range goes on",
        "train/guards.py",
        "            or memory.outside_in_row >= config.max_spike_steps\n",
        "",
        f"{GUARDS}::test_a_loss_that_stays_out_of_range_goes_back",
    ),
    Mutation(
        "a row of skipped steps goes on",
        "train/guards.py",
        "            or memory.skipped_in_row >= config.max_skipped\n",
        "",
        A_ROW,
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
        "a rollback forgets what an earlier one left out",
        "train/guards.py",
        'decided = {"rollbacks": rollbacks, "windows": sorted([*apart, window])}',
        'decided = {"rollbacks": rollbacks, "windows": [window]}',
        f"{INTERRUPTED} {SO_OFTEN}",
    ),
    Mutation(
        "a rollback that was not saved yet is forgotten when the run is killed",
        "train/guards.py",
        '    return {**counters, "guard": {**counters.get("guard", {}), **decided}} if decided else counters\n',
        "    return counters\n",
        INTERRUPTED,
    ),
    Mutation(
        "what rollbacks left out is read again when the run goes on",
        "train/loop.py",
        '"guard": self.guard.memory.model_dump()}',
        '"guard": self.guard.memory.model_dump(exclude={"windows"})}',
        INTERRUPTED,
    ),
    Mutation(
        "another setting brings back the data that was left out",
        "train/guards.py",
        '"guard": {"windows": counters.get("guard", {}).get("windows", [])}}',
        '"guard": {}}',
        f"{BACK}::test_other_settings_begin_anew_but_for_the_data_that_is_left_out",
    ),
    Mutation(
        "weights are saved without a look whether they are finite",
        "train/loop.py",
        "        if not self.guard.is_sound(self.result.step, state):\n",
        "        if False:\n",
        f"{BACK}::test_a_weight_that_is_not_finite_is_never_saved_and_the_run_goes_back",
    ),
    Mutation(
        "the last weights are saved without a look whether they are finite",
        "train/guards.py",
        "        if not self.is_sound(step, state):\n            raise",
        "        if False:\n            raise",
        f"{BACK}::test_the_last_save_keeps_the_good_checkpoint_too",
    ),
    Mutation(
        "infinity counts as finite",
        "train/guards.py",
        "    return bool(bounds.isfinite().all())\n",
        "    return not bool(bounds.isnan().any())\n",
        f"{GUARDS}::test_a_value_that_is_not_finite_is_found_wherever_it_is",
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
    Mutation(
        "a run that skipped most of its last steps is a success",
        "train/guards.py",
        "        if finished and 2 * skipped >= lately:\n",
        "        if finished and skipped > lately:\n",
        f"{GUARDS}::test_a_run_that_skipped_most_of_its_last_steps_is_no_success",
    ),
    Mutation(
        "a rollback goes to a doubtful checkpoint",
        "train/loop.py",
        "        if self.guard.trouble:\n            files[DOUBTFUL] = self.guard.trouble\n        elif",
        "        if",
        f"{BACK}::test_a_checkpoint_that_a_signal_asks_for_in_a_row_of_skips_replaces_no_good_one",
    ),
    Mutation(
        "metrics.jsonl has the steps after a rollback twice",
        "train/loop.py",
        "            run.log.rewind(self.result.step)\n",
        "            pass\n",
        A_ROW,
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
        "early stopping begins anew when a run goes on",
        "train/loop.py",
        '        self.evaluations_since_best = counters.get("evaluations_since_best", 0)\n',
        "",
        "train/test_best.py::test_a_run_ends_early_when_the_held_out_loss_stays_higher",
    ),
    Mutation(
        "the best is whichever was evaluated last",
        "train/loop.py",
        "        better = self.best is None or loss < self.best.loss\n",
        "        better = True\n",
        "train/test_best.py::test_the_best_is_saved_when_it_is_found_and_kept",
    ),
    Mutation(
        "the last step is evaluated before it is saved",
        "train/loop.py",
        "        if follows is Next.STEP and run.validation and is_due(result.step, run.config.eval_every):\n",
        "        if run.validation and (is_last or is_due(result.step, run.config.eval_every)):\n",
        "train/test_loop.py::test_the_last_step_is_saved_before_its_evaluation_which_a_signal_ends",
    ),
    Mutation(
        "the last evaluation does not hear a signal",
        "train/loop.py",
        "        if engine.any_rank(bool(signals)):\n            return None\n",
        "",
        "train/test_loop.py::test_the_last_step_is_saved_before_its_evaluation_which_a_signal_ends",
    ),
    Mutation(
        "a signal ends the run without a checkpoint",
        "train/loop.py",
        "        if self.unsaved:\n",
        "        if self.unsaved and not result.stopped:\n",
        "train/test_loop.py::test_a_signal_in_a_step_ends_the_run_after_it",
    ),
    Mutation(
        "a failed save is not said",
        "train/checkpoints.py",
        "            if error is not None:\n",
        "            if False:\n",
        "checkpoint/test_saver.py::test_an_error_is_a_warning_at_the_next_step",
    ),
    Mutation(
        "another run may write into the folder whose lock was deleted",
        "train/folder.py",
        "        if _identity(self._lock_path) == self._lock_identity:\n            return\n",
        "        return\n",
        "train/test_folder.py::test_a_deleted_lock_is_taken_again_and_a_second_writer_noticed",
    ),
    Mutation(
        "the holder of a run folder is named by another pid",
        "train/folder.py",
        '            "pid": os.getpid(),\n',
        '            "pid": os.getppid(),\n',
        "train/test_folder.py::test_a_second_job_is_refused_and_told_who_holds_the_folder",
    ),
    Mutation(
        "a run goes on with another learning rate without a word",
        "train/settings.py",
        '    "log.", "checkpoint.",',
        '    "log.", "train.optimizer", "checkpoint.",',
        "train/test_pretrain.py::test_another_config_is_refused_with_every_difference",
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
        "a collapsed router is judged from a single step",
        "train/symptoms.py",
        '        if all(record["experts"][place]["entropy"] < limit for',
        '        if any(record["experts"][place]["entropy"] < limit for',
        CASES,
    ),
    Mutation(
        "dead experts are those of any one window",
        "train/symptoms.py",
        "dead = reduce(and_, (",
        "dead = reduce(lambda one, other: one | other, (",
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
    Mutation(
        "waiting for data is when reading takes no time",
        "train/symptoms.py",
        "min(shares) > WAITING and",
        "min(shares) < WAITING and",
        CASES,
    ),
    Mutation(
        "memory creeps when it rose once",
        "train/symptoms.py",
        "        steady = min(rises) > 0.5 * mean and rises[-1] > 0.75 * mean\n",
        "        steady = sum(rises) > 0\n",
        CASES,
    ),
    Mutation(
        "data repeats only in fine-tuning",
        "train/symptoms.py",
        "    most = EPOCHS if past.plan.fresh else EPOCHS_IN_FINETUNING\n",
        "    most = EPOCHS_IN_FINETUNING if past.plan.fresh else EPOCHS\n",
        f"{ALARMS}::test_what_is_said_of_settings",
    ),
    Mutation(
        "an alarm that stays is said at every look",
        "train/alarms.py",
        "            if said is None or not said <= step < said + REMIND:\n",
        "            if True:\n",
        CASES,
    ),
    Mutation(
        "log.alarms=false is ignored",
        "train/log.py",
        "        for alarm in alarms if self._config.alarms else ():\n",
        "        for alarm in alarms:\n",
        f"{ALARMS}::test_settings_are_judged_before_the_first_step",
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
        "a disk without room for the checkpoints is not missed",
        "train/preflight.py",
        "    if kept * one <= free:\n",
        "    if one <= free:\n",
        f"{PREFLIGHT}::test_what_cannot_run_is_refused_before_anything_is_made",
    ),
    Mutation(
        "a folder of something else is trained in",
        "train/preflight.py",
        "    if strange:\n",
        "    if False:\n",
        f"{PREFLIGHT}::test_a_folder_of_something_else_is_not_trained_in",
    ),
    Mutation(
        "a dry run does not look at the layout",
        "train/preflight.py",
        "world_size=processes(config, topology))\n    check_layout(config, topology)\n",
        "world_size=processes(config, topology))\n",
        f"{PREFLIGHT}::test_a_dry_run_refuses_a_layout_that_the_launch_would_refuse",
    ),
    Mutation(
        "a learning rate may be infinite",
        "config/section.py",
        "allow_inf_nan=False",
        "allow_inf_nan=True",
        f"{PREFLIGHT}::test_what_cannot_run_is_refused_before_anything_is_made",
    ),
)
