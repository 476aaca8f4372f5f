"""`python -m moe_lm` is `moe-lm`: the command line in a process of its own."""

import sys

from moe_lm.common.signals import ended_at_once, ended_by_exception

OF_MANY_RANKS = ("pretrain", "finetune")  # a signal ends them at once until their first step is done
GO_ON = ("prepare", "quickstart")  # of the other verbs, those that continue where they were stopped


def main() -> None:
    """Run the verb that `sys.argv` names and end the process with its exit code."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    with ended_at_once() if verb in OF_MANY_RANKS else ended_by_exception(verb in GO_ON):
        try:
            from moe_lm.parallel.launch import heed_launcher

            heed_launcher()
            from moe_lm.cli import main as cli  # only now: this takes long enough for a signal to come

            cli.main()
        except SystemExit as stop:
            from moe_lm.common.process import end

            if isinstance(stop.code, int):
                end(stop.code)
            raise


if __name__ == "__main__":
    main()
