"""How good a model is: perplexity and bits per byte of text, facts found far back, and answers to tasks.

Reading order: perplexity, texts, needle, scoring, harness, tasks.
"""
