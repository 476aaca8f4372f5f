"""Ranks: how they meet and speak, and how experts and layers are divided over them, from outside.

Reading order: topology, launch, torchrun, pdsh, heartbeat, meeting, process_group, exchange, journey, expert_parallel,
sequence_parallel, logical, watch, spread, simulated.
"""
