"""Serving and writing text: rows and queues, stop strings, limits, keys, clients that do not read, and the end."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SCHEDULER = "tools/serve/test_scheduler.py"
ERRORS = "tools/serve/test_errors.py"
SERVER = "tools/serve/test_server.py"
DECODE = "generate/test_decode.py"
TEXT = "generate/test_text.py"

MUTATIONS = (
    # The queue
    Mutation(
        "after SIGTERM new requests are taken",
        "tools/serve/server.py",
        "        scheduler.refuse()\n",
        "",
        f"{SERVER}::test_sigterm_lets_what_runs_end_and_nothing_new_begin",
    ),
    Mutation(
        "the queue is never full",
        "tools/serve/scheduler.py",
        "            if self.running + self.queued + ticket.rows > self.most:\n",
        "            if False:\n",
        f"{SCHEDULER}::test_a_full_queue_is_said_at_once",
    ),
    # Rows
    Mutation(
        "two requests share a row",
        "generate/decode.py",
        "            self.cache.move_row(len(self._rows), place)\n            self._rows[place] = last\n",
        "            self._rows[place] = last\n",
        f"{DECODE}::test_any_row_can_be_cancelled",
    ),
    Mutation(
        "every text of a request draws with the same seed",
        "generate/decode.py",
        "seed=(self.seed + row) % (1 << 32))",
        "seed=self.seed % (1 << 32))",
        f"{DECODE}::test_row_i_of_a_batch_draws_with_seed_plus_i",
    ),
    Mutation(
        "an answer does not end where its template ends a turn",
        "tokenizer/tokenizer.py",
        "        return frozenset({self.eos_id, *(self.special_tokens[token] for token in ends)})\n",
        "        return frozenset({self.eos_id} if ends else {self.eos_id})\n",
        "generate/test_session.py",
    ),
    # Stop strings and characters
    Mutation(
        "a stop string in the middle of a token is not seen",
        "generate/text.py",
        "if (start := held.find(stop)) >= 0]",
        "if (start := held.find(stop)) >= 0 and held.endswith(stop)]",
        f"{TEXT}::test_text_ends_before_the_first_stop_string_however_it_is_cut",
    ),
    # Limits
    Mutation(
        "any key that begins like the right one will do",
        "tools/serve/limits.py",
        'if not hmac.compare_digest(given, f"Bearer {self.limits.api_key}".encode()):',
        'if not f"Bearer {self.limits.api_key}".encode().startswith(given):',
        f"{ERRORS}::test_the_key",
    ),
    Mutation(
        "a body that says it is too large is read",
        "tools/serve/limits.py",
        "        if length.isdigit() and int(length[:20]) > self.limits.max_body:\n",
        "        if False:\n",
        f"{ERRORS}::test_a_body_that_does_not_come_is_not_waited_for",
    ),
    Mutation(
        "a body that does not come is waited for",
        "tools/serve/limits.py",
        "            async with asyncio.timeout(self.limits.timeout):\n",
        "            async with asyncio.timeout(None):\n",
        f"{ERRORS}::test_a_body_that_does_not_come_is_not_waited_for",
    ),
    Mutation(
        "an answer may take any time",
        "tools/serve/endpoints.py",
        "        timers.append(loop.call_later(limit, end_late))\n",
        "",
        f"{ERRORS}::test_an_answer_that_takes_too_long_is_ended",
    ),
    Mutation(
        "a client that does not read fills the memory",
        "tools/serve/scheduler.py",
        "            if self._unread > MOST_UNREAD:\n",
        "            if False:\n",
        f"{SCHEDULER}::test_a_client_that_does_not_read_is_dropped_before_its_answer_takes_memory",
    ),
)
