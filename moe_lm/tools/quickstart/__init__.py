"""The whole walk on one machine, in minutes.

Reading order: setup, quickstart, results.
"""
