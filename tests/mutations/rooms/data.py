"""Data: the order of visits, a rank's rows, damaged shards, preparing, and foreign files of text."""

from __future__ import annotations

from tests.mutations.frame import Mutation

ORDER = "data/test_order.py"
BATCHES = "data/test_batches.py"
SHARDS = "data/test_shards.py"

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
        "every seed has the same order",
        "data/order.py",
        "partial(shuffle_key, self._seed, 1 + source)",
        "partial(shuffle_key, 1, 1 + source)",
        f"{ORDER}::test_seeds_and_epochs_have_orders_of_their_own",
    ),
    Mutation(
        "ranks read overlapping rows",
        "parallel/topology.py",
        "        return range(self.row_group * share, (self.row_group + 1) * share)\n",
        "        return range(self.row_group, self.row_group + share)\n",
        "train/test_loop.py::test_micro_batches_of_all_ranks_are_the_global_batch",
    ),
    Mutation(
        "ranks disagree on their share of the rows",
        "parallel/topology.py",
        "        share = global_batch_size // self.row_groups\n",
        "        share = global_batch_size // self.row_groups + (self.rank > 0)\n",
        "train/test_loop.py::test_micro_batches_of_all_ranks_are_the_global_batch",
    ),
    # Phases
    Mutation(
        "a source begins anew in every phase",
        "data/order.py",
        "        begun = self.begun + visits\n",
        "        begun = 0\n",
        "data/test_phases.py::test_a_source_that_goes_on_in_one_length_is_read_as_without_phases",
    ),
    Mutation(
        "the parts of a long window that was begun are read again in long windows",
        "data/order.py",
        "            place = min(-(-place // chunk) * self.chunk, self.size)\n",
        "            place = place // self.parts\n",
        "data/test_phases.py::test_no_token_comes_twice_in_an_epoch_and_few_are_left_out",
    ),
    # Shards
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
    # Marks
    Mutation(
        "a document begins behind its own bos, where bos is eos",
        "data/marks.py",
        "        found &= tokens[:, 1:] == self.bos\n",
        "",
        f"{BATCHES}::test_packing_is_that_of_a_token_by_token_reference",
    ),
    Mutation(
        "documents of other programs are not divided, as no bos begins them",
        "data/marks.py",
        "        if self.bos is None:\n            return found\n",
        "",
        f"{SHARDS}::test_foreign_documents_are_those_that_training_divides",
    ),
)
