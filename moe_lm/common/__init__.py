"""Small things that every room may use.

Reading order: errors, files, integrity, process, signals, terminal.
"""
