"""The loss of a step: objectives, balance terms and scheduled sampling.

Reading order: training_loss, balance, quantile_balance, preference, scheduled_sampling.
"""
