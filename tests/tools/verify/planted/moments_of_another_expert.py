"""Planted: after a resume every expert has its neighbour's Adam moments."""

from moe_lm.engine.deepspeed_engine import DeepSpeedEngine
from moe_lm.model.transformer import is_expert

right = DeepSpeedEngine.load_state


def wrong(self, state):
    def is_wrong(name):
        return name.startswith(("exp_avg.", "exp_avg_sq.")) and is_expert(name)

    # Those of a rank's own piece, so that nothing but the order is wrong.
    for name, piece in state.items():
        if is_wrong(name):
            expert = piece.shape[1] * piece.shape[2]
            for view in piece.views:
                view.copy_(view.flatten().roll(expert).view(view.shape))
    right(self, state)


DeepSpeedEngine.load_state = wrong
