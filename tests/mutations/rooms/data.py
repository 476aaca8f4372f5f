"""Data: the order of visits, a rank's rows, damaged shards, preparing, and foreign files of text."""

from __future__ import annotations

from tests.mutations.frame import Mutation

ORDER = "data/test_order.py"
BATCHES = "data/test_batches.py"
SHARDS = "data/test_shards.py"
PREPARE = "data/test_prepare.py"

MUTATIONS = (
    Mutation(
        "an epoch of a mixed source repeats items and leaves others out",
        "data/order.py",
        "        turns = _ranks(sources) if self._exact_epochs else mixed\n",
        "        turns = mixed\n",
        f"{BATCHES}::test_an_epoch_of_every_source_of_a_mix_is_exact",
    ),
    Mutation(
        "the visits of a source are numbered anew in each block",
        "data/order.py",
        "self._item(source, block[mine] * share + turns[mine]",
        "self._item(source, turns[mine]",
        f"{ORDER}::test_sources_have_their_shares_and_items_equal_visits",
    ),
    Mutation(
        "every epoch has the same order",
        "data/order.py",
        "shuffle_key(self._seed, 1 + source, epoch))",
        "shuffle_key(self._seed, 1 + source, 0 * epoch))",
        f"{ORDER}::test_seeds_and_epochs_have_orders_of_their_own",
    ),
    Mutation(
        "every seed has the same order",
        "data/order.py",
        "shuffle_key(self._seed, 1 + source, epoch))",
        "shuffle_key(1, 1 + source, epoch))",
        f"{ORDER}::test_seeds_and_epochs_have_orders_of_their_own",
    ),
    Mutation(
        "the shuffle visits an item twice",
        "data/order.py",
        "        outside = outside[walked >= size]\n",
        "        outside = outside[walked > size]\n",
        f"{BATCHES}::test_every_window_is_seen_exactly_once_an_epoch",
    ),
    Mutation(
        "a begun run takes the new order of its sources",
        "data/batches.py",
        "            self._mixture = begun\n",
        "            pass\n",
        "train/test_data.py::test_a_run_keeps_the_order_of_its_sources_that_it_began_with",
    ),
    Mutation(
        "ranks read overlapping rows",
        "parallel/topology.py",
        "        return range(self.rank * share, (self.rank + 1) * share)\n",
        "        return range(self.rank, self.rank + share)\n",
        "train/test_loop.py::test_micro_batches_of_all_ranks_are_the_global_batch",
    ),
    Mutation(
        "ranks disagree on their share of the rows",
        "parallel/topology.py",
        "        share = global_batch_size // self.world_size\n",
        "        share = global_batch_size // self.world_size + (self.rank > 0)\n",
        "train/test_loop.py::test_micro_batches_of_all_ranks_are_the_global_batch",
    ),
    Mutation(
        "a step of data is left out",
        "data/batches.py",
        "        first = offset * self._batch_size\n",
        "        first = (offset + 1) % self._plan_steps * self._batch_size\n",
        f"{BATCHES}::test_a_step_is_the_same_in_whatever_order_steps_are_asked_for golden/test_golden.py",
    ),
    Mutation(
        "a target is the token itself",
        "data/batches.py",
        "        targets = tokens[:, 1:].astype(np.int64)\n",
        "        targets = tokens[:, :-1].astype(np.int64)\n",
        f"{BATCHES}::test_targets_are_the_next_tokens",
    ),
    Mutation(
        "a document attends to the one before it",
        "data/batches.py",
        "            bounds = np.sort(np.concatenate([bounds, begins[begins % self._length != 0]]))\n",
        "",
        f"{BATCHES}::test_packing_by_hand_without_attention_across_documents",
    ),
    Mutation(
        "the end of the held-out text is counted with its padding",
        "data/batches.py",
        "        batch.targets[torch.arange(self._length) >= last[:, None]] = IGNORE\n",
        "",
        f"{BATCHES}::test_evaluation_predicts_every_token_once_and_pads_the_rest",
    ),
    # Shards
    Mutation(
        "a damaged shard is read",
        "data/shards.py",
        "    if found != expected:\n",
        "    if False:\n",
        f"{SHARDS}::test_a_shard_that_was_altered_is_refused_by_name",
    ),
    Mutation(
        "the tokens of a shard are not verified at a start",
        "data/shards.py",
        "vocab_size if verify else None)",
        "None if verify else None)",
        f"{SHARDS} train/test_data.py::test_a_corrupt_shard_is_named_before_anything_is_built",
    ),
    Mutation(
        "a damaged shard is left out unasked",
        "data/shards.py",
        '        if damage and on_damage == "stop":\n',
        "        if False:\n",
        f"{SHARDS}::test_a_damaged_shard_is_left_out_where_that_is_chosen",
    ),
    Mutation(
        "the loss of a shard that is left out is not counted",
        "data/shards.py",
        "    lost = sum(tokens[name] for name in damage)\n",
        "    lost = 0\n",
        f"{SHARDS}::test_a_damaged_shard_is_left_out_where_that_is_chosen",
    ),
    Mutation(
        "a run does not say what is left out",
        "train/run.py",
        "        report_losses(log, recipe.left_out, start_step)\n",
        "",
        "train/test_data.py::test_a_run_goes_on_without_a_damaged_shard_where_that_is_chosen",
    ),
    Mutation(
        "a token outside the vocabulary is trained on",
        "data/shards.py",
        "        if outside is None and tokens.max() >= vocab_size:\n",
        "        if outside is None and tokens.max() > 2 * vocab_size:\n",
        f"{SHARDS}::test_a_token_outside_the_vocabulary_is_named_with_file_and_offset",
    ),
    Mutation(
        "the manifest's word for the vocabulary is believed",
        "data/shards.py",
        "manifest.vocab_size if tokenizer is None else min(manifest.vocab_size, tokenizer.vocab_size)\n",
        "manifest.vocab_size\n",
        f"{SHARDS}::test_the_tokenizer_bounds_the_tokens_whatever_the_manifest_says",
    ),
    Mutation(
        "shards of another tokenizer are read",
        "data/shards.py",
        "        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:\n",
        "        if False:\n",
        f"{SHARDS}::test_the_tokenizer_must_be_the_one_that_made_the_shards {PREPARE}",
    ),
    Mutation(
        "a shard that is cut while it is read gives what memory held",
        "data/stream.py",
        "            if not count:\n",
        "            if not count:\n                return\n            if not count:\n",
        f"{SHARDS}::test_a_shard_that_is_cut_while_it_is_read_is_named",
    ),
    Mutation(
        "a run goes on with other data",
        "train/settings.py",
        "    if batches.fingerprint != data:\n",
        "    if False:\n",
        "train/test_data.py::test_other_data_under_the_same_path_is_refused",
    ),
    # Preparing
    Mutation(
        "held-out documents are trained on",
        "data/prepare.py",
        'writers["train"].add(tokens[~token_held], index[~held])\n',
        'writers["train"].add(tokens, index)\n',
        f"{PREPARE}::test_what_is_kept_round_trips_and_what_is_not_is_reported",
    ),
    Mutation(
        "a chunk that an interrupted prepare made of other text is used",
        "data/chunks.py",
        '            digest.update(len(data).to_bytes(8, "little") + data)\n',
        '            digest.update(len(data).to_bytes(8, "little"))\n',
        f"{PREPARE}::test_what_an_interrupted_run_made_from_other_text_is_not_used",
    ),
    Mutation(
        "YAML with a key twice is read",
        "config/strict_yaml.py",
        "        if first is not key:\n",
        "        if False:\n",
        "config/test_strict_yaml.py::test_a_key_twice_in_a_config_is_refused_with_both_lines",
    ),
)
