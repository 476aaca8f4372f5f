"""Serving and writing text: rows and queues, stop strings, limits, keys, clients that do not read, and the end."""

from __future__ import annotations

from tests.mutations.frame import Mutation

SCHEDULER = "tools/serve/test_scheduler.py"
ERRORS = "tools/serve/test_errors.py"
COMPLETIONS = "tools/serve/test_completions.py"
CONNECTIONS = "tools/serve/test_connections.py"
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
    Mutation(
        "a request for many texts keeps the others waiting",
        "tools/serve/scheduler.py",
        "                ticket = min(self._waiting, key=lambda ticket: ticket.running)\n",
        "                ticket = self._waiting[0]\n",
        f"{SCHEDULER}::test_a_queue_that_is_there_is_shared_row_by_row",
    ),
    Mutation(
        "more texts run than there are rows",
        "tools/serve/scheduler.py",
        "            while self._waiting and self.running < self.slots:\n",
        "            while self._waiting and self.running <= self.slots:\n",
        f"{SCHEDULER}::test_a_queue_that_is_there_is_shared_row_by_row",
    ),
    Mutation(
        "the rows of a client that goes away go on",
        "tools/serve/scheduler.py",
        "                if ticket in self._left:\n",
        "                if False:\n",
        f"{SCHEDULER}::test_a_client_that_goes_away_frees_its_rows",
    ),
    Mutation(
        "a step that fails leaves NaN in the cache",
        "generate/decode.py",
        "        del self.cache  # first, so that there is room for the next one\n"
        "        self.cache = cache_for(self.model, self.slots, self.capacity)\n",
        "",
        f"{DECODE}::test_after_a_step_that_failed_a_cleared_decoder_is_as_new",
    ),
    Mutation(
        "a step that fails ends the server",
        "tools/serve/scheduler.py",
        "                    self._drop(_told(error), self._at_work())\n",
        "                    self._drop(_told(error), self._at_work())\n                    return\n",
        f"{SCHEDULER}::test_broken_logits_end_what_runs_and_not_the_server",
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
        "a prompt begins on what an earlier one left in its row",
        "generate/decode.py",
        "        part.lengths.zero_()\n",
        "",
        f"{DECODE}::test_requests_that_come_late_or_are_cancelled_change_nothing_for_the_others",
    ),
    Mutation(
        "every text of a request draws with the same seed",
        "generate/decode.py",
        "seed=(self.seed + row) % (1 << 32))",
        "seed=self.seed % (1 << 32))",
        f"{DECODE}::test_row_i_of_a_batch_draws_with_seed_plus_i",
    ),
    Mutation(
        "ids beyond the tokenizer are written",
        "generate/decode.py",
        "        logits_RV = logits_RV[:, : self.vocab_size]\n",
        "",
        f"{DECODE}::test_ids_beyond_the_tokenizer_are_never_chosen",
    ),
    Mutation(
        "a text has one token too many",
        "generate/decode.py",
        '        return Step(self.request, token, None if self.room else "length")\n',
        '        return Step(self.request, token, None if self.room >= 0 else "length")\n',
        f"{DECODE}::test_how_texts_end",
    ),
    Mutation(
        "an answer does not end where its template ends a turn",
        "tokenizer/tokenizer.py",
        "        return frozenset({self.eos_id, *(self.special_tokens[token] for token in ends)})\n",
        "        return frozenset({self.eos_id} if ends else {self.eos_id})\n",
        "generate/test_session.py",
    ),
    Mutation(
        "top-k keeps one token too many",
        "generate/strategies.py",
        "logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1)",
        "logits_RV.topk(min(top_k + 1, logits_RV.shape[-1]), dim=-1)",
        "generate/test_strategies.py::test_draws_follow_what_temperature_then_top_k_then_top_p_leave",
    ),
    Mutation(
        "logits that are not numbers give a text",
        "generate/strategies.py",
        "    if broken_R.any():\n",
        "    if False:\n",
        "generate/test_strategies.py::test_logits_without_a_distribution_are_an_error",
    ),
    # Stop strings and characters
    Mutation(
        "a stop string in the middle of a token is not seen",
        "generate/text.py",
        "if (start := held.find(stop)) >= 0]",
        "if (start := held.find(stop)) >= 0 and held.endswith(stop)]",
        f"{TEXT}::test_text_ends_before_the_first_stop_string_however_it_is_cut",
    ),
    Mutation(
        "the beginning of a stop string is shown",
        "generate/text.py",
        "        safe = len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)\n",
        "        safe = len(held)\n",
        f"{TEXT}::test_a_stop_string_split_over_tokens_never_shows",
    ),
    Mutation(
        "half a character is shown",
        "generate/text.py",
        "        whole = text.removesuffix(UNFINISHED)\n",
        "        whole = text\n",
        f"{TEXT}::test_pieces_of_real_tokens_are_the_text_in_whole_characters",
    ),
    Mutation(
        "stop strings of a request do not reach its rows",
        "tools/serve/endpoints.py",
        "tokenizer.decode, body.stop, prefix",
        "tokenizer.decode, [], prefix",
        f"{COMPLETIONS}::test_stop_strings_end_the_text_before_them",
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
        "the metrics need no key",
        "tools/serve/limits.py",
        'OPEN = ("/", "/health")',
        'OPEN = ("/", "/health", "/metrics")',
        f"{ERRORS}::test_the_key",
    ),
    Mutation(
        "a page that rebinds its name is answered",
        "tools/serve/limits.py",
        "        if self.limits.hosts is not None and name not in self.limits.hosts:\n",
        "        if False:\n",
        f"{ERRORS}::test_a_page_that_rebinds_its_name_is_not_answered",
    ),
    Mutation(
        "a body in chunks may have any size",
        "tools/serve/limits.py",
        "                    if len(body) > self.limits.max_body:\n",
        "                    if False:\n",
        f"{ERRORS}::test_a_body_that_is_longer_than_it_says_or_says_nothing",
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
    Mutation(
        "a client that does not read stays when its time is up",
        "tools/serve/endpoints.py",
        "            timers.append(loop.call_later(LAST_WORDS, close))",
        "            timers.append(loop.call_later(1e9, close))",
        f"{SCHEDULER}::test_a_client_that_does_not_read_is_dropped_when_its_time_is_up",
    ),
    Mutation(
        "headers that come byte by byte are waited for",
        "tools/serve/connections.py",
        "            self._deadline = loop.call_later(self._connections.head_seconds, self.transport.abort)\n",
        "            self._deadline = loop.call_later(1e9, self.transport.abort)\n",
        f"{CONNECTIONS}::test_a_connection_whose_request_does_not_come_is_closed",
    ),
    Mutation(
        "idle connections keep others out",
        "tools/serve/connections.py",
        "            oldest.transport.abort()\n",
        "            pass\n",
        f"{CONNECTIONS}::test_idle_connections_without_a_key_leave_room_for_others",
    ),
    Mutation(
        "--max-tokens is no limit",
        "tools/serve/endpoints.py",
        "            if most is not None and wanted is not None and wanted > most:\n",
        "            if False:\n",
        f"{ERRORS}::test_limits_of_length",
    ),
    Mutation(
        "a body may be nested without end",
        "tools/serve/requests.py",
        "        if not level:\n            return value\n    raise ValueError(TOO_DEEP)\n",
        "        if not level:\n            return value\n    return value\n",
        ERRORS,
    ),
)
