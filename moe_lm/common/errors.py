"""Errors for the user: one sentence with the thing, its value, what was expected and what to do."""

from moe_lm.common.exits import FAILED, MISUSED


class MoeLmError(Exception):
    """A failure (exit code 1). The message is written for the user and is complete.

    An error that is `common` to all ranks of a run is printed only by rank 0.
    """

    exit_code = FAILED

    def __init__(self, message: str, common: bool = False) -> None:
        super().__init__(message)
        self.common = common


class UsageError(MoeLmError, ValueError):
    """A wrong command, configuration or input, found before any work began (exit code 2)."""

    exit_code = MISUSED
