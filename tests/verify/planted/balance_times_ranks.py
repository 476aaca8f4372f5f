"""Planted: the balance loss grows with the number of ranks."""

from moe_lm.parallel.topology import current_topology
from moe_lm.train.losses import TrainingLoss

right = TrainingLoss._balance_loss
TrainingLoss._balance_loss = lambda self, *arguments: right(self, *arguments) * current_topology().world_size
