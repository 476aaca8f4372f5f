"""Perplexity and bits per byte of a run, and of baselines on the same text."""
