"""`moe-lm verify`: every layout of parallelism trains a small copy of the model as one process does.

Reading order: parity, layouts, scale, ranks, worker, documents, deviation.
"""
