"""Small things that every room may use.

Reading order: errors, files, process, signals, terminal.
"""
