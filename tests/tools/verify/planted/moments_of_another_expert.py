"""Planted: after a resume every expert has its neighbour's Adam moments."""

from moe_lm.engine.deepspeed_engine import DeepSpeedEngine
from moe_lm.model.transformer import is_expert
from moe_lm.parallel.logical import undivide

right = DeepSpeedEngine.load_state


def wrong(self, state):
    def is_wrong(name):
        return name.startswith(("exp_avg.", "exp_avg_sq.")) and is_expert(name)

    # Of a rank's own experts, so that nothing but the order is wrong.
    right(self, {name: undivide(t, True).roll(1, 0) if is_wrong(name) else t for name, t in state.items()})


DeepSpeedEngine.load_state = wrong
