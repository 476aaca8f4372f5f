"""Beside the walk, which imports none of them.

Reading order: quickstart (with docstrings), doctor, verify, plan, interop, serve, explain, checkpoints.
"""
