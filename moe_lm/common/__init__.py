"""Small things that every room may use.

Reading order: exits, verbs, errors, files, integrity, process, signals, terminal.
"""
