"""The training loop, and the recipes that pretraining and fine-tuning bring to it.

Reading order: loop, ahead, result, timetable, deadline, probes, spikes, guards, checkpoints, start, run, phases,
summary, preflight, pretrain, finetune, reference, settings, folder, past, symptoms, alarms, log, figures, display,
trackers, cost.
"""
