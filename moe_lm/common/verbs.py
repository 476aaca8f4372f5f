"""The verb that a command line names, and how signals end it. `__main__` asks before it imports anything else."""

from __future__ import annotations

from collections.abc import Iterable

# A launcher starts them, and signals end them at once until a step is done.
OF_MANY_RANKS = ("pretrain", "finetune", "data")
LAUNCHED = (*OF_MANY_RANKS, "prepare")  # what a launcher may start on many hosts
GO_ON = ("prepare", "quickstart")  # of the other verbs, those that continue where they were stopped
LOCAL_RANK = ("--local_rank", "--local-rank")  # what DeepSpeed's launcher adds


def verb_of(arguments: Iterable[str]) -> str:
    """The first word that is no option; empty if there is none."""
    words = iter(arguments)
    for word in words:
        if word in LOCAL_RANK:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return ""
