"""The engine: a step over micro-batches and ranks, what is skipped, what a checkpoint holds of it."""

from __future__ import annotations

from tests.mutations.frame import Mutation

TORCH = "engine/test_torch_engine.py"
PLAIN_LOOP = f"{TORCH}::test_steps_are_those_of_a_plain_loop"
SKIPPED = f"{TORCH}::test_a_step_that_is_not_finite_is_skipped"
RANKS = "distributed/test_experts_of_ranks.py"
ROUNDED = "distributed/test_rounded_weights.py"

MUTATIONS = (
    Mutation(
        "a step that is not finite is taken",
        "engine/torch_engine.py",
        "        skipped = not (math.isfinite(grad_norm) and accepted)\n",
        "        skipped = False\n",
        SKIPPED,
    ),
    Mutation(
        "the router's biases move on a skipped step",
        "engine/engine.py",
        "        if not update.skipped:\n            self._note_load(totals.load)\n",
        "        self._note_load(totals.load)\n",
        SKIPPED,
    ),
    Mutation(
        "accumulation divides twice",
        "engine/torch_engine.py",
        "            (part.loss * self.topology.world_size).backward()\n",
        "            (part.loss * self.topology.world_size / (1 if last else 2)).backward()\n",
        f"{TORCH}::test_accumulated_gradients_are_those_of_one_pass",
    ),
    Mutation(
        "the gradient's norm leaves the experts out",
        "engine/torch_engine.py",
        "        parameters = [p for p in self.model.parameters() if p.grad is not None]\n",
        "        parameters = [p for p in self.model.parameters() if p.grad is not None and p.ndim < 3]\n",
        PLAIN_LOOP,
    ),
    Mutation(
        "the moments are lost when a run goes on",
        "engine/torch_engine.py",
        "        assign(self.state(), state)\n",
        '        assign({n: t for n, t in self.state().items() if n.startswith("model.")}, state)\n',
        f"{TORCH}::test_a_loaded_state_goes_on_to_the_bit",
    ),
    Mutation(
        "the router's biases are lost when a run goes on",
        "engine/torch_engine.py",
        "        assign(self.state(), state)\n",
        '        assign({n: t for n, t in self.state().items() if not n.endswith("correction_bias")}, state)\n',
        f"{TORCH}::test_a_loaded_state_goes_on_to_the_bit",
    ),
    Mutation(
        "the load of the step before is lost when a run goes on",
        "engine/engine.py",
        "            assign({LOAD: self._load}, common)\n",
        "            pass\n",
        f"{TORCH}::test_a_run_that_goes_on_has_the_load_of_the_step_before",
    ),
    Mutation(
        "the random state is not restored",
        "engine/engine.py",
        '        torch.set_rng_state(flat(piece_of(common["random.cpu"])))\n',
        "",
        f"{TORCH}::test_state_is_named_by_parameter_and_holds_the_random_state",
    ),
    Mutation(
        "activation checkpointing does nothing",
        "engine/build.py",
        "    recomputation.apply(built.model, train.activation_checkpointing)\n",
        "",
        "engine/test_recomputation.py::test_bytes_that_are_kept",
    ),
    Mutation(
        "recomputation chooses the experts anew",
        "engine/recomputation.py",
        '            _wrap(block, "attend_and_route", ATTENTION | CHOICE)\n',
        '            _wrap(block, "attend_and_route", ATTENTION)\n',
        "engine/test_recomputation.py::test_selective_recomputation_repeats_nothing_dear",
    ),
    Mutation(
        "the run depends on what the process drew before",
        "engine/build.py",
        "    torch.manual_seed(train.seed)  # the run does not depend on what this process drew before\n",
        "",
        "train/test_loop.py::test_the_random_state_is_part_of_a_checkpoint",
    ),
    Mutation(
        "Muon orthogonalises in bfloat16 in a run of float32",
        "engine/torch_engine.py",
        "build_optimizers(self.model, train.optimizer, self.dtype, share_of)",
        "build_optimizers(self.model, train.optimizer, torch.bfloat16, share_of)",
        f"{TORCH}::test_muon_orthogonalises_in_the_precision_of_the_run",
    ),
    Mutation(
        "ZeRO goes on skipping after a skipped step",
        "engine/deepspeed_engine.py",
        "        self.zero.skip = not accepted\n",
        "        self.zero.skip = self.zero.skip or not accepted\n",
        RANKS,
    ),
    Mutation(
        "rounded weights are those of the step before",
        "engine/torch_engine.py",
        "            self._weights_changed()\n        for optimizer",
        "        for optimizer",
        "kernels/test_rounding.py::test_steps_and_evaluations_are_those_of_autocast_to_the_bit",
    ),
    Mutation(
        "ZeRO's masters begin with rounded weights",
        "engine/deepspeed_zero.py",
        "            if part is not None and parameter in exact:\n",
        "            if part is not None and parameter in ():\n",
        ROUNDED,
    ),
    Mutation(
        "ZeRO 2 with offload adds up gradients in bfloat16",
        "engine/deepspeed_zero.py",
        "torch.zeros(size, dtype=torch.float32, pin_memory=pinned)\n",
        "torch.zeros(size, dtype=torch.bfloat16, pin_memory=pinned)\n",
        ROUNDED,
    ),
    Mutation(
        "a slow rank is told by the median",
        "engine/pace.py",
        "    return statistics.fmean(sorted(seconds)[:-1])\n",
        "    return statistics.median(seconds)\n",
        "engine/test_pace.py::test_a_rank_that_is_slow_in_every_third_step_is_named_within_20_steps",
    ),
    Mutation(
        "one rank works on all of Muon's matrices",
        "optim/matrices.py",
        "            worker = load.index(min(load))\n",
        "            worker = 0\n",
        "optim/test_matrices.py::test_every_matrix_has_one_worker_and_the_work_is_shared",
    ),
    Mutation(
        "the biases that tokens need leave the present ones out",
        "objective/quantile_balance.py",
        "(scores_TE + bias_E).topk(",
        "scores_TE.topk(",
        "objective/test_quantile_balance.py::test_the_biases_are_the_quantiles_of_what_each_token_needs",
    ),
    Mutation(
        "the moving average begins at 0",
        "optim/average.py",
        "                share = (1 - decay) / (1 - decay ** float(state[STEPS]))\n",
        "                share = 1 - decay\n",
        "optim/test_average.py::test_weights_after_a_step_weigh_less_with_age",
    ),
    Mutation(
        "recomputation refuses what the forward pass did not run",
        "engine/recomputation.py",
        "    return keeping, _Repeating(kept, giving_back)\n",
        "    return keeping, giving_back\n",
        "engine/test_recomputation.py::test_what_runs_around_a_block_may_differ_when_it_is_repeated",
    ),
)
