"""Documents out of files and data sets.  Reading order: sources.py, files.py, split.py."""
