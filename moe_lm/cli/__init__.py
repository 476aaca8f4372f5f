"""The verbs of the command line; each imports its stage when it runs.

Reading order: main, build, train, use, checkpoints, settings, options, arguments.
"""
