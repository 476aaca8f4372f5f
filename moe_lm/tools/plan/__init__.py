"""What a step costs before a device is rented.

Reading order: trace (what a rank does in a step), devices, measure, predict.
"""
