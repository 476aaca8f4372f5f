"""Signals, exit codes, and ranks that watch each other."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SIGNALS = "common/test_signals.py"
WATCH = "parallel/test_watch.py"
RANKS = "distributed/test_ranks.py"
SHARED = "parallel/test_sequence_parallel.py"
SHARED_ATTENTION = f"{SHARED}::test_attention_of_ranks_that_share_rows_is_that_of_one"

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
        'PATIENT = ("starting", "verifying", "loading", "saving", "compiling")',
        'PATIENT = ("starting", "verifying", "loading", "compiling")',
        f"{RANKS}::test_a_save_may_take_longer_than_ranks_wait_for_each_other",
        slow=True,
    ),
    # Who shares rows
    Mutation(
        "key heads go to ranks that have other query heads",
        "parallel/sequence_parallel.py",
        "            k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))\n",
        "            k, v = (x.repeat(1, 1, heads // x.shape[2], 1) for x in (k, v))\n",
        SHARED_ATTENTION,
    ),
    Mutation(
        "gradients of heads stay where they are",
        "parallel/sequence_parallel.py",
        "        return _exchanged(gradient_PBSW, ctx.group), None\n",
        "        return gradient_PBSW, None\n",
        SHARED_ATTENTION,
    ),
    Mutation(
        "a rank balances its own part of a row",
        "objective/balance.py",
        "    counts_BE = over_row(\n",
        "    counts_BE = whole(\n",
        f"{SHARED}::test_a_sequences_balance_loss_is_the_sum_of_its_parts",
    ),
    Mutation(
        "rows that ranks share are counted for each of them",
        "engine/engine.py",
        '            rows=int(totals["rows"]) // self.topology.sequence_parallel_size,\n',
        '            rows=int(totals["rows"]),\n',
        "tools/verify/test_verify.py::test_every_layout_equals_one_process",
    ),
)
