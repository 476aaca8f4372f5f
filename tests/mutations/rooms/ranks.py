"""Signals, exit codes, and ranks that watch each other."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SIGNALS = "common/test_signals.py"
WATCH = "parallel/test_watch.py"
RANKS = "distributed/test_ranks.py"

MUTATIONS = (
    Mutation(
        "a second signal is ignored",
        "common/signals.py",
        "        elif again(number):\n            os._exit(128 + number)\n",
        "        elif again(number):\n            pass\n",
        f"{SIGNALS}::test_a_second_signal_ends_the_process_at_once",
    ),
    Mutation(
        "a signal that a launcher sends twice counts as two",
        "common/signals.py",
        "        return number != signal.SIGHUP and time.monotonic() - self._first > SAME_EVENT_SECONDS\n",
        "        return number != signal.SIGHUP\n",
        f"{SIGNALS}::test_one_event_that_sends_several_signals_is_one",
    ),
    Mutation(
        "a closed terminal ends training without a word",
        "common/signals.py",
        "STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)\n",
        "STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)\n",
        "train/test_pretrain.py::test_a_closed_terminal_saves_and_the_log_says_so",
    ),
    Mutation(
        "what was ignored at the start is heard",
        "common/signals.py",
        "if number not in MAY_BE_IGNORED or signal.getsignal(number) != IGNORED]",
        "]",
        f"{SIGNALS}::test_what_was_ignored_at_the_start_stays_ignored",
    ),
    Mutation(
        "a stop is a success",
        "common/exits.py",
        "STOPPED = os.EX_TEMPFAIL  # 75\n",
        "STOPPED = 0\n",
        f"{SIGNALS}::test_training_that_has_not_begun_ends_at_once",
    ),
    Mutation(
        "a verb is interrupted within an import",
        "common/signals.py",
        "        if not heard.is_set() and not _imports(frame):\n",
        "        if not heard.is_set():\n",
        f"{SIGNALS}::test_an_import_is_finished_before_the_verb_is_interrupted",
    ),
    Mutation(
        "a signal within a long call of a library is not heard",
        "common/signals.py",
        "            if time.monotonic() > deadline:\n                say",
        "            if time.monotonic() > deadline + 1e9:\n                say",
        f"{SIGNALS}::test_a_signal_is_heard_within_a_long_call_of_a_library",
    ),
    Mutation(
        "Ctrl-C ends the compilers of a step",
        "common/signals.py",
        "        mask, end = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS), BROKEN\n",
        "        mask, end = signal.pthread_sigmask(signal.SIG_BLOCK, []), BROKEN\n",
        f"{SIGNALS}::test_ctrl_c_spares_the_processes_that_training_starts",
    ),
    Mutation(
        "a launcher starts again what a usage error ended",
        "common/exits.py",
        "        if code in (MISUSED, STOPPED):\n",
        "        if code in (STOPPED,):\n",
        "launch/test_torchrun.py::test_a_usage_error_is_said_once_and_starts_nothing_again",
    ),
    # Who hangs, who is lost
    Mutation(
        "the one that hangs is the one that is ahead",
        "parallel/watch.py",
        "    fewest = min(sign.moves for sign in signs.values())\n",
        "    fewest = max(sign.moves for sign in signs.values())\n",
        f"{WATCH}::test_the_one_who_hangs_is_named",
    ),
    Mutation(
        "an innocent rank is named beside the silent one",
        "parallel/watch.py",
        "    hung = silent or behind\n",
        "    hung = sorted({*silent, *behind, 0})\n",
        f"{WATCH}::test_the_one_who_hangs_is_named",
    ),
    Mutation(
        "a rank that has ended gives a sign of life",
        "parallel/heartbeat.py",
        "            if rank in self.signs and self.signs[rank].number != sign.number:\n",
        "            if rank in self.signs:\n",
        f"{WATCH}::test_a_rank_that_waits_gives_signs_of_life_and_one_that_has_ended_does_not",
    ),
    Mutation(
        "a rank gives signs of life as often as its main thread moves",
        "parallel/heartbeat.py",
        "                self._give_sign()\n                self._listen()\n",
        "                if self.place.seconds < BEAT_SECONDS:\n                    self._give_sign()\n"
        "                self._listen()\n",
        f"{WATCH}::test_a_rank_that_waits_gives_signs_of_life_and_one_that_has_ended_does_not",
    ),
    Mutation(
        "a long save counts as standing still",
        "parallel/watch.py",
        'PATIENT = ("starting", "loading", "saving")',
        'PATIENT = ("starting", "loading")',
        f"{RANKS}::test_a_save_may_take_longer_than_ranks_wait_for_each_other",
        slow=True,
    ),
    Mutation(
        "a rank that stands still is never noticed",
        "parallel/watch.py",
        "            elif place.seconds > due and (failure := self._judge(meeting, heartbeat)) is not None:\n",
        "            elif place.seconds > 1e9 and (failure := self._judge(meeting, heartbeat)) is not None:\n",
        f"{RANKS}::test_a_rank_that_stands_still_is_named_with_the_place",
    ),
    Mutation(
        "ranks with other settings train together",
        "parallel/watch.py",
        "            if first.get(name) != theirs.get(name):\n",
        "            if False:\n",
        f"{RANKS}::test_ranks_with_other_settings_are_refused",
    ),
    Mutation(
        "an error on one rank is raised there alone",
        "parallel/process_group.py",
        "        for _, error in outcomes:\n            if error is not None:\n",
        "        for _, error in [(mine, error)]:\n            if error is not None:\n",
        "checkpoint/test_checkpoint_death.py::test_two_ranks_save_together_and_any_layout_loads",
    ),
)
