"""Small things that every room may use.

Reading order: exits, verbs, errors, files, hub, integrity, storage, process, environment, signals, terminal.
"""
