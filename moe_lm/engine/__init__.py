"""Micro-batches become an optimizer step: one interface, two engines.

Reading order: engine, torch_engine, deepspeed_engine, deepspeed_zero, deepspeed_config, build, recomputation, frozen,
pace.
"""
