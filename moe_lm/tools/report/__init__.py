"""The page of a run, which opens without a network: what happened, what looks wrong, and what to do about it.

Reading order: report, reading, thinning, page, words, charts, heatmap.
"""
