"""Every layout of parallelism against one process, step by step.

Reading order: parity, layouts, scale, documents, worker, groups, weights, deviation.
"""
