"""Text to token ids and back, and conversations to ids with their loss mask.

Reading order: tokenizer, files, words, training, chat.
"""
