"""Commented configs: for a text and the machine that is here, and for what one wants to do.

Reading order: init, kinds, commented.
"""
