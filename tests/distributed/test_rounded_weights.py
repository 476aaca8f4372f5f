"""Bfloat16 under every stage of ZeRO: half the weights, and the numbers of the torch engine."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import finish, start_program
from tests.tiny import tiny_model


def test_zero_multiplies_bfloat16_weights_and_keeps_everything_else_in_float32(tmp_path: Path) -> None:
    """2 ranks, 2 micro-batches a step; checkpoints hold the float32 weights and go from engine to engine.

    Of gradients that are added up in bfloat16, those of four equal micro-batches are not those of one.
    """
    first, *_ = finish(start_program(2, Path(__file__).with_name("rounded_of_ranks.py"), tmp_path))
    names = {
        name
        for name, parameter in tiny_model(num_hidden_layers=2, n_shared_experts=1).named_parameters()
        if parameter.ndim >= 2
    }
    multiplied = {name for name in names if not name.endswith(("embed_tokens.weight", "gate.weight"))}
    for layout, found in json.loads(first).items():
        assert set(found["bfloat16"]) == multiplied, layout
        assert (found["start"], found["loaded"], found["loaded by torch"]) == (0, 0, 0), layout
        assert found["four times the same"] < 1e-6, layout
        assert found["threads"] == ([3, 1] if layout.endswith("offload") else [1, 1])  # of 6 cores, for 2 ranks
        # The head's gradient is float32 here, and rounded in the torch engine; ZeRO 3 adds up the gradients of
        # activations in another order, which rounds other bits of bfloat16.
        assert max(found["first step"], found["second step"]) < 5e-3, layout
