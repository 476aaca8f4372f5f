"""`python -m moe_lm` is `moe-lm`: the command line, in a process of its own."""

import sys

from moe_lm.cli import main as cli


def main() -> None:
    """Run the verb that `sys.argv` names and end with its code."""
    try:
        cli.main()
    except SystemExit as stop:
        topology = sys.modules.get("moe_lm.parallel.topology")
        if topology is not None and isinstance(stop.code, int):
            topology.end(stop.code)
        raise


if __name__ == "__main__":
    main()
