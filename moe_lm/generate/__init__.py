"""A trained model writes: decoding over a cache, choosing tokens, and the verbs that show it.

Reading order: session, decode, forward, strategies, penalties, text, sample, beams, conversation, chat, typed, painter,
compiled.
"""
