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
        "a closed terminal ends training without a word",
        "common/signals.py",
        "STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)\n",
        "STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)\n",
        "train/test_pretrain.py::test_a_closed_terminal_saves_and_the_log_says_so",
    ),
    Mutation(
        "a stop is a success",
        "common/exits.py",
        "STOPPED = os.EX_TEMPFAIL  # 75\n",
        "STOPPED = 0\n",
        f"{SIGNALS}::test_training_that_has_not_begun_ends_at_once",
    ),
    # Who hangs, who is lost
    Mutation(
        "an innocent rank is named beside the silent one",
        "parallel/watch.py",
        "    hung = silent or behind\n",
        "    hung = sorted({*silent, *behind, 0})\n",
        f"{WATCH}::test_the_one_who_hangs_is_named",
    ),
    Mutation(
        "a long save counts as standing still",
        "parallel/watch.py",
        'PATIENT = ("starting", "loading", "saving")',
        'PATIENT = ("starting", "loading")',
        f"{RANKS}::test_a_save_may_take_longer_than_ranks_wait_for_each_other",
        slow=True,
    ),
)
