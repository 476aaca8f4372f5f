"""The errors a user can meet: one sentence with the thing, its value, what was expected and what to do."""


class MoeLmError(Exception):
    """Something failed (exit code 1). The message is written for the user and is complete.

    Of an error that is `common` to all ranks of a run, rank 0 alone speaks.
    """

    exit_code = 1

    def __init__(self, message: str, common: bool = False) -> None:
        super().__init__(message)
        self.common = common


class UsageError(MoeLmError, ValueError):
    """The command, configuration or input was wrong before any work began (exit code 2)."""

    exit_code = 2
