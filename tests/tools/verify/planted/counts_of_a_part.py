"""Planted: where ranks share rows, each takes the expert counts of its own part for those of the whole row."""

from moe_lm.parallel.sequence_parallel import SequenceGroup

SequenceGroup.sum = lambda self, tensor: tensor
