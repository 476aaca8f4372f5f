"""Planted: the balance loss grows with the number of ranks."""

from moe_lm.objective import training_loss
from moe_lm.parallel.topology import current_topology

right = training_loss.balance_loss
training_loss.balance_loss = lambda *arguments: right(*arguments) * current_topology().world_size
