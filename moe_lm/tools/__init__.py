"""Beside the walk, which imports none of them.

Reading order: quickstart (with docstrings and sizes), init, doctor, ranks, data_verify, verify, plan, interop, serve,
explain, report, checkpoints, merge.
"""
