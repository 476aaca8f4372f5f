"""How good a model is: `perplexity` and bits per byte."""
