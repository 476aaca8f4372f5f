"""`moe-lm` with a rank that stands still: `python standing_still.py WHERE VERB ...`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from moe_lm.__main__ import main
from moe_lm.checkpoint import write
from moe_lm.objective.training_loss import TrainingLoss

IS_RANK_1 = os.environ["RANK"] == "1"
settle, forward = write._settle, TrainingLoss.forward
forwards = 0


def settle_slowly(*arguments: Any) -> Any:
    """Rank 1 has a disk that is slower than the ranks wait for each other in a step."""
    time.sleep(8 if IS_RANK_1 else 0)
    return settle(*arguments)


def settle_never(*arguments: Any) -> Any:
    if IS_RANK_1:
        threading.Event().wait()
    return settle(*arguments)


def settle_stopped(*arguments: Any) -> Any:
    if IS_RANK_1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return settle(*arguments)


def forward_of_step_5_never(*arguments: Any) -> Any:
    global forwards
    forwards += 1
    if IS_RANK_1 and forwards == 5:
        threading.Event().wait()
    return forward(*arguments)


where = sys.argv.pop(1)
if where == "forward":
    TrainingLoss.forward = forward_of_step_5_never  # type: ignore[method-assign]
else:
    write._settle = {"slow save": settle_slowly, "save": settle_never, "stopped save": settle_stopped}[where]
main()
