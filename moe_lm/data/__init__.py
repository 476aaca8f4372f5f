"""Token shards and batches from text; training examples and pairs from conversations and preferences.

Reading order: prepare.py, chunks.py, shards.py, order.py, batches.py for pretraining; formats.py, records.py,
packing.py, examples.py, pairs.py, preview.py for fine-tuning.
"""
