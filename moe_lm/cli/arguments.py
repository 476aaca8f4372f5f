"""Arguments and helpers that several verbs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_lm.cli.settings import complete_setting
from moe_lm.common.errors import UsageError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Values that override the file's, like train.steps=100 or --train.steps 100.",
        autocompletion=complete_setting,
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a checkpoint in one.")]
DType = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="Dtype of the written weights; default: as stored. Router biases stay float32."),
]
BasePath = Annotated[Path | None, typer.Option("--base", help="Path of the adapters' base run, if it has moved.")]
ProofMemory = Annotated[
    float | None, typer.Option(min=0, help="GiB that the check of logits may use; default: half of free memory.")
]


@contextmanager
def copying(title: str, always: bool = False) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar of bytes, done and in all, on stderr; off a terminal nothing, or lines with `always`."""
    from rich.console import Console

    from moe_lm.common.terminal import byte_bar

    console = Console(stderr=True)
    if always or console.is_terminal:
        with byte_bar(console, title) as advance:
            yield advance
    else:
        yield lambda done, total: None


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of things, done and in all, on stderr with the time that is left; off a terminal nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def refuse(options: Mapping[str, object], where: str) -> None:
    """Raise UsageError for the first of these options that is given."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {value} has no meaning for {where}; leave it out")


def gib(value: float | None) -> int | None:
    """Bytes."""
    return None if value is None else int(value * 2**30)
