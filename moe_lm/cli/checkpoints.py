"""The verbs about checkpoints: `checkpoint`, which lists, verifies, compares, prunes and fetches, and `merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_lm.cli.arguments import RunPath
from moe_lm.cli.options import Verb
from moe_lm.common.errors import UsageError
from moe_lm.common.process import to_type

app = typer.Typer(no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


def add_to(parent: typer.Typer) -> None:
    """Add the verbs to the command line."""
    parent.command(cls=Verb, rich_help_panel="Build")(merge)
    parent.add_typer(
        app,
        name="checkpoint",
        help="List, verify and compare the checkpoints of a run, delete old ones, and fetch one from a bucket.",
        rich_help_panel="Use",
    )


def merge(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run folder with --last, or checkpoints and runs.")
    ],
    run_dir: Annotated[Path, typer.Option(help="Run folder to write.")],
    last: Annotated[int | None, typer.Option(min=2, help="Newest checkpoints of the run to average.")] = None,
    weights: Annotated[
        str,
        typer.Option(help="Weights, oldest first: equal, linear, exponential (each twice the last), or numbers."),
    ] = "equal",
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the moving average that one run kept (train.optimizer.ema_decay).")
    ] = False,
) -> None:
    """Average checkpoints of one model into a new run, which evaluates, exports and can be trained on."""
    from moe_lm.tools import merge

    if ema:
        if len(runs) > 1 or last is not None or weights != "equal":
            raise UsageError("--ema takes the average that one run kept; give one run, without --last and --weights")
        print(merge.take_moving_average(runs[0], run_dir))
    else:
        print(merge.merge(runs, run_dir, last, weights))
    print(f"wrote {run_dir}; next: {to_type('eval', run_dir)}")


@app.command("list", cls=Verb)
def list_(run: Run, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show step, date, size and losses of each checkpoint, and which is the best, pinned or damaged."""
    from json import dumps

    from moe_lm.tools import checkpoints

    rows = checkpoints.listed(run)
    print(dumps(checkpoints.as_json(rows), indent=2) if json else checkpoints.table(rows))
    if not json and (start := checkpoints.began_with(run)) is not None:
        print(start)


@app.command(cls=Verb)
def verify(run: RunPath) -> None:
    """Check every file of a checkpoint, or of all of a run's, against its checksum; exit code 1 if one is damaged."""
    from moe_lm.tools import checkpoints

    damaged = False
    for folder, damages in checkpoints.verify(run):
        damaged |= bool(damages)
        for damage in damages or ["sound"]:
            print(f"{folder}: {damage}")
    raise typer.Exit(int(damaged))


@app.command(cls=Verb)
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="Run folder, or a checkpoint in one.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Compare settings, shapes and values of two checkpoints; exit code 0 if equal, 1 if not, 2 for trouble."""
    from moe_lm.tools import checkpoints

    differ = False
    for line in checkpoints.diff(first, second):
        differ = True
        print(line)
    print("they differ" if differ else "equal to the bit")
    raise typer.Exit(int(differ))


@app.command(cls=Verb)
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
) -> None:
    """Delete all checkpoints but the newest, the best and pinned ones; damaged and unfinished ones go too."""
    from moe_lm.tools import checkpoints

    for line in checkpoints.prune(run, keep, dry_run):
        print(line)


@app.command(cls=Verb)
def fetch(
    url: Annotated[str, typer.Argument(metavar="URL", help="The run's checkpoint.upload_to, like s3://bucket/run.")],
    run: Run,
) -> None:
    """Bring the newest complete checkpoint of a run, with its logs, from a bucket into a run folder, verified."""
    from moe_lm.checkpoint import bucket, checkpoint
    from moe_lm.parallel.process_group import Ranks

    step, damaged = bucket.bring_back(run / "checkpoints", url, Ranks())
    for damage in damaged:
        print(f"warning: passed over: {damage}", file=sys.stderr)
    if step is None:
        newest = max(checkpoint.complete_checkpoints(run / "checkpoints"), default=None)
        if newest is None:
            raise UsageError(f"there is no {'sound' if damaged else 'complete'} checkpoint in {url}; check the address")
        raise UsageError(f"{run} has step {newest}, and {url} has no sound checkpoint that is newer")
    print(f"fetched step {step}; next: {to_type('sample', run)}")
