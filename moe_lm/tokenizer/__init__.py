"""A byte-level BPE tokenizer, and chat templates with their loss masks.

Reading order: training.py, tokenizer.py, chat/.
"""
