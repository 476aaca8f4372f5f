"""`python -m moe_lm` is `moe-lm`: the command line in a process of its own."""

import sys
from contextlib import AbstractContextManager, nullcontext

from moe_lm.common.signals import ended_at_once, ended_by_exception
from moe_lm.common.verbs import GO_ON, LAUNCHED, OF_MANY_RANKS, verb_of


def main() -> None:
    """Run the verb that `sys.argv` names and end the process with its exit code."""
    verb = verb_of(sys.argv[1:])
    if verb in OF_MANY_RANKS:
        with ended_at_once():
            run(nullcontext())
    else:
        run(ended_by_exception(verb in GO_ON))


def run(signals: AbstractContextManager[None]) -> None:
    """Run the verb while `signals` are heard; the exception of one counts as the verb's own exit."""
    try:
        with signals:
            from moe_lm.common.environment import prepare
            from moe_lm.parallel.launch import heed_launcher

            heed_launcher()
            if (verb := verb_of(sys.argv[1:])) in LAUNCHED:
                prepare(bound=verb in OF_MANY_RANKS)  # before anything imports torch
            from moe_lm.cli import main as cli  # only now: this takes long enough for a signal to come

            cli.main()
    except SystemExit as stop:
        from moe_lm.common.process import end

        if isinstance(stop.code, int):
            end(stop.code)
        raise


if __name__ == "__main__":
    main()
