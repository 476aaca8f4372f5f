"""The loop, and what pretraining and fine-tuning give it.

Reading order: loop, run, pretrain, finetune, reference, folder, log, figures, display, trackers, cost.
"""
