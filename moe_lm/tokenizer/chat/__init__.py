"""Chat templates: a conversation as text in which the author of every character is known.

Reading order: template, traced, environment, writing, sandbox, turns.
"""
