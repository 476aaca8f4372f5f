"""What a step minimises.

Reading order: training_loss, balance, preference, scheduled_sampling.
"""
