"""The command line: one verb for each stage of the walk.

A verb is imported when it runs, so that `--help` needs no torch and a wrong config is refused at once. Exit codes are
those of common/exits.py. An error is one sentence on stderr; `--debug`, before or after the verb, adds the traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_lm import __version__
from moe_lm.cli import build, checkpoints, settings, use
from moe_lm.cli.options import Verb, Walk, with_numbers
from moe_lm.common.errors import MoeLmError
from moe_lm.common.signals import Interrupted
from moe_lm.common.verbs import LAUNCHED, verb_of
from moe_lm.parallel.launch import launched_ranks, without_local_rank

if TYPE_CHECKING:
    from moe_lm.parallel.meeting import Meeting

INTERRUPTED = 130  # 128 + SIGINT, as click counts a KeyboardInterrupt

app = typer.Typer(
    cls=Walk,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 finished, 1 error, 2 wrong use, 75 stopped by a signal or train.hours with everything saved, "
    "or with nothing to save yet.",
)


def main() -> None:
    """Run the verb that `sys.argv` names and exit with its code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a terminal that knows ASCII only shows the rest as escapes
            output.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv  # taken out of the arguments, so that it may stand before or after the verb
    arguments = with_numbers(without_local_rank([item for item in sys.argv[1:] if item != "--debug"]))
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    ranks = None
    try:
        if verb_of(arguments) in LAUNCHED:
            ranks = launched_ranks()
        code = typer.main.get_command(app)(arguments, prog_name="moe-lm", standalone_mode=ranks is None, obj=ranks)
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as stop:
        if stop.code == INTERRUPTED and not isinstance(stop, Interrupted):
            print("interrupted", file=sys.stderr)
        unwritten = _flush_quietly()
        if unwritten and not stop.code:
            _stop(unwritten, 1, debug, ranks)
        raise
    except MoeLmError as error:
        _stop(f"error: {error}", error.exit_code, debug, ranks, error.common)
    except Exception as error:
        if hasattr(error, "format_message"):  # wrong use, which Typer shows in a box, but not in one for every rank
            _stop(f"error: {error.format_message()}", 2, debug, ranks, common=True)
        unwritten = _flush_quietly()
        if unwritten:
            _stop(unwritten, 1, debug, ranks)
        hint = "" if debug else "; run again with --debug for the traceback"
        _stop(f"internal error: {type(error).__name__}: {error}{hint}", 1, debug, ranks)


def _stop(message: str, code: int, debug: bool, ranks: Meeting | None, common: bool = False) -> None:
    _flush_quietly()
    if debug:
        traceback.print_exc()
    if ranks is None:
        print(message, file=sys.stderr)
    else:
        ranks.fail(message, code, common)
    sys.exit(code)


def _flush_quietly() -> str | None:
    """The error when the rest of the output cannot be written. Without this, Python complains when it exits.

    A reader that went away (`moe-lm ... | head`) is not an error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return f"error: stdout cannot be written ({error.strerror}); free some space, or send it elsewhere"
    return None


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moe-lm {__version__}")
        raise typer.Exit


@app.callback()
def moe_lm(
    debug: Annotated[bool, typer.Option("--debug", help="Show full tracebacks (before or after the verb).")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version)] = False,
) -> None:
    """Mixture-of-Experts language models: from a tokenizer to samples, from a laptop to a cluster."""


@app.command(cls=Verb, rich_help_panel="Start here")
def quickstart(
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time limit in minutes, for all stages together.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT", help="File, folder or glob of text to train on; default: Python's standard library."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for everything that is written; default: runs/quickstart, or runs/my for my.txt."),
    ] = None,
) -> None:
    """Run every stage end to end in minutes, from text to samples; again with more minutes, it trains on."""
    from moe_lm.tools.quickstart import quickstart

    quickstart.run(minutes=minutes, corpus=corpus, run_dir=run_dir)


@app.command(cls=Verb, rich_help_panel="Start here")
def init(
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="File, folder or glob to train on; to fine-tune, rows of conversations."),
    ] = None,
    kind: Annotated[
        Literal["pretrain", "continue", "finetune", "lora", "dpo", "tokenizer"],
        typer.Option("--for", help="What the config is for."),
    ] = "pretrain",
    start: Annotated[
        Path | None, typer.Option("--start-from", metavar="RUN", help="Run or checkpoint to begin with.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: the text's name, in this folder.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time limit of pretraining on this machine, in minutes; default: 20.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented config: for a text, sized to it and to this machine, or for what you want to do."""
    from moe_lm.tools.init import init

    for line in init.init(text, kind, start, out, minutes, force):
        print(line)


@app.command(cls=Verb, rich_help_panel="Start here")
def doctor() -> None:
    """Report what this machine has, what is missing and how to install it."""
    from moe_lm.tools import doctor

    raise typer.Exit(doctor.run())


settings.add_to(app)
build.add_to(app)
use.add_to(app)
checkpoints.add_to(app)
