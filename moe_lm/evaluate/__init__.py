"""How good a model is: perplexity and bits per byte of text, and answers to tasks.

Reading order: perplexity, texts, scoring, harness, tasks.
"""
