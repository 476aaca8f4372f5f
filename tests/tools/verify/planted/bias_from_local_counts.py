"""Planted: router biases move by the counts of the rank's own rows."""

from moe_lm.engine import engine
from moe_lm.objective.losses import TrainingLoss

right_load, right_update = TrainingLoss.load, engine.update_router_biases
own = []


def load(self, batch, output):
    own.append(right_load(self, batch, output))
    return own[-1]


def update(model, _, rate):
    right_update(model, own[-1], rate)


TrainingLoss.load, engine.update_router_biases = load, update
