"""Planted: router biases move by the counts of the rank's own rows."""

from moe_lm.engine import engine
from moe_lm.objective import balance

right_load, right_update = balance.expert_load, engine.update_router_biases
own = []


def load(routing, counted):
    own.append(right_load(routing, counted))
    return own[-1]


def update(model, _, rate):
    right_update(model, own[-1], rate)


balance.expert_load, engine.update_router_biases = load, update
