"""The exit codes, for schedulers and launchers.

| code | meaning | what a scheduler should do |
|---|---|---|
| 0 | finished | nothing |
| 1 | an error of the run | start it again, a bounded number of times: it goes on from the last checkpoint |
| 2 | a usage error: wrong command, config or data | nothing: it would fail again |
| 75 | stopped by a signal or train.hours, with everything saved or nothing to save yet | start it again: it goes on |
| 128+n | ended by signal n: a second one while training, or any in a verb that cannot go on | nothing |
"""

from __future__ import annotations

import os
from contextlib import suppress

FINISHED, FAILED, MISUSED = 0, 1, 2
STOPPED = os.EX_TEMPFAIL  # 75
LAUNCHER = "MOE_LM_LAUNCHER"  # the folder in which a launcher and its ranks tell each other what signals cannot


def exit_code(code: int) -> int:
    """The code for the kernel: that of the run, but 0 after telling a launcher what must not start the ranks again.

    Launchers take every code but 0 for a failure: they end the other ranks, print a traceback and start all again.
    """
    folder = os.environ.get(LAUNCHER)
    if folder is None:
        return code
    note = os.path.join(folder, f"exit-{os.environ.get('RANK', os.getpid())}-")  # a full disk takes a name, not a text
    with suppress(OSError):  # the launcher is on another machine
        for other in (MISUSED, STOPPED):  # of a rank that ended before it
            with suppress(FileNotFoundError):
                os.unlink(f"{note}{other}")
        if code in (MISUSED, STOPPED):
            os.close(os.open(f"{note}{code}", os.O_CREAT | os.O_WRONLY))
            return FINISHED
    return code
