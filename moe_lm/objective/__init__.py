"""The loss of a step: objectives, balance terms and scheduled sampling.

Reading order: training_loss, balance, preference, scheduled_sampling.
"""
