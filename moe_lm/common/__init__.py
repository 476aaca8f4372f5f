"""Small things that every room may use.

Reading order: errors, exits, files, integrity, process, signals, terminal.
"""
