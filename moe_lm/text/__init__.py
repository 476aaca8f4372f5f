"""Documents from files, data sets and the standard library.

Reading order: sources.py, files.py, split.py.
"""
