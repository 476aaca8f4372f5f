"""Documents out of files and data sets, and which of them are held out.

Reading order: files, sources, pieces, split.
"""
