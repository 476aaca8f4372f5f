"""Planted: the balance loss grows with the number of ranks."""

from moe_lm.objective.losses import TrainingLoss
from moe_lm.parallel.topology import current_topology

right = TrainingLoss._balance_loss
TrainingLoss._balance_loss = lambda self, *arguments: right(self, *arguments) * current_topology().world_size
