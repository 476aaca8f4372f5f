"""Small things that every room may use.

Reading order: exits, errors, files, integrity, process, signals, terminal.
"""
