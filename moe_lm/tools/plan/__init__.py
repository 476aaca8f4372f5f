"""What a step costs before a device is rented.

Reading order: trace (what a rank does in a step), simulate (one rank, nothing allocated; with layers, places,
operators, recording, fusion, findings, memory, matrices, zero), devices, measure, predict, search, report, plan (the
verb).
"""
