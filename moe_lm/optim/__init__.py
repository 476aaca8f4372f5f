"""Parameter groups, schedules and the router-bias update; the optimizers that torch lacks.

Reading order: groups, matrices, muon, lamb, average.
"""
