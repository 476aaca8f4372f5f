"""Planted: router biases move by the counts of the rank's own rows."""

from moe_lm.engine import engine
from moe_lm.objective import training_loss

right_load, right_update = training_loss.expert_load, engine.update_router_biases
own = []


def load(routings, counted):
    own.append(right_load(routings, counted))
    return own[-1]


def update(model, _, rate):
    right_update(model, own[-1], rate)


training_loss.expert_load, engine.update_router_biases = load, update
