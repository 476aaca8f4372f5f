"""moe-lm: Mixture-of-Experts language models, from a tokenizer to samples, from a laptop to a cluster."""

__version__ = "0.1.0"
