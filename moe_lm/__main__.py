"""`python -m moe_lm` is `moe-lm`: the command line in a process of its own."""

from moe_lm.cli import main as cli
from moe_lm.common.process import end


def main() -> None:
    """Run the verb that `sys.argv` names and end the process with its exit code."""
    try:
        cli.main()
    except SystemExit as stop:
        if isinstance(stop.code, int):
            end(stop.code)
        raise


if __name__ == "__main__":
    main()
