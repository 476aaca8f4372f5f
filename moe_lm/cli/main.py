"""The command line: one verb a stage of the walk, each imported when it runs, so that `--help` needs no torch and a
wrong config is refused at once.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. An error is one sentence on stderr; `--debug`, before or
after the verb, adds the traceback.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lm import __version__
from moe_lm.cli import generate as cli_generate
from moe_lm.cli import interop as cli_interop
from moe_lm.cli import serve as cli_serve
from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.launch import launched_ranks

if TYPE_CHECKING:
    from moe_lm.parallel.meeting import Meeting

INTERRUPTED = 130  # 128 + SIGINT, as shells count
OF_MANY_RANKS = ("pretrain", "finetune")  # the verbs that a launcher starts many times
ALONE = {
    "--preview": "3",
    "--logprobs": "0",
    "--show-routing": "-1",
}  # options whose number may be left out, and what it is then


class Walk(typer.core.TyperGroup):
    """Lists the verbs in the order of the walk; Typer would put the group `tokenizer` last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda verb: verb not in ("quickstart", "doctor", "tokenizer"))


app = typer.Typer(
    cls=Walk,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    tokenizer_app, name="tokenizer", help="Train a byte-level BPE tokenizer, or measure one.", rich_help_panel="Build"
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moe-lm {__version__}")
        raise typer.Exit


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's, like train.steps=100."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the config, show sizes and steps, stop.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in it.")]
Base = Annotated[Path | None, typer.Option(help="Where the base of adapters is now, if it has moved.")]


def main() -> None:
    """Run the verb that `sys.argv` names and exit with its code."""
    debug = "--debug" in sys.argv  # taken out of the arguments, so that it may stand before or after the verb
    arguments = _without_local_rank([item for item in sys.argv[1:] if item != "--debug"])
    arguments = _with_a_number(arguments)
    verb = next((item for item in arguments if not item.startswith("-")), "")
    ranks = None
    try:
        if verb in OF_MANY_RANKS:
            ranks = launched_ranks()
        code = typer.main.get_command(app)(arguments, prog_name="moe-lm", standalone_mode=ranks is None, obj=ranks)
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
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


def _without_local_rank(arguments: list[str]) -> list[str]:
    """DeepSpeed's launcher adds `--local_rank=N` to the command line, beside the environment variable."""
    kept, rest = [], iter(arguments)
    for item in rest:
        name, _, value = item.partition("=")
        if name in ("--local_rank", "--local-rank"):
            number = value or next(rest, "0")
            if "RANK" in os.environ:  # alone it would look like one of many ranks
                os.environ.setdefault("LOCAL_RANK", number)
        else:
            kept.append(item)
    return kept


def _with_a_number(arguments: list[str]) -> list[str]:
    """What stands in `ALONE` may have no number; Typer's options always take a value."""
    kept = []
    for place, item in enumerate(arguments, 1):
        alone = item in ALONE and not "".join(arguments[place : place + 1]).isdigit()
        kept += [item, ALONE[item]] if alone else [item]
    return kept


def _flush_quietly() -> str | None:
    """What is wrong where the rest of the output cannot be written; without this Python complains when it exits.

    A reader that went away (`moe-lm ... | head`) is no error.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return f"error: stdout cannot be written ({error.strerror}); free some space, or send it elsewhere"
    return None


@app.callback()
def moe_lm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; after the verb too.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version)] = False,
) -> None:
    """Mixture-of-Experts language models: from a tokenizer to samples, from a laptop to a cluster."""


@app.command(rich_help_panel="Start here")
def quickstart(
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Time for the whole walk.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Your own text instead of Python's standard library.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/quickstart"),
) -> None:
    """The whole walk in minutes: tokenizer, shards, pretraining, fine-tuning, samples, evaluation."""
    from moe_lm.tools import quickstart

    quickstart.run(minutes=minutes, corpus=corpus, run_dir=run_dir)


@app.command(rich_help_panel="Start here")
def doctor() -> None:
    """What this machine has, what is missing and how to install it."""
    from moe_lm.tools import doctor

    raise typer.Exit(doctor.run())


@tokenizer_app.command("train")
def tokenizer_train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the recipe.")],
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer and write it to the recipe's output folder."""
    from moe_lm.config.data import TokenizerRecipe
    from moe_lm.config.reading import load_config

    settings = load_config(TokenizerRecipe, recipe, overrides or ())

    from rich.console import Console

    from moe_lm.common.terminal import byte_bar
    from moe_lm.tokenizer.training import inspect, train_tokenizer

    with byte_bar(Console(stderr=True), "reading and merging") as advance:
        tokenizer = train_tokenizer(settings, lambda report: advance(report.text_bytes, None))
    tokenizer.save(settings.output)
    print(inspect(tokenizer, settings.sources))
    print(f"wrote {settings.output}")


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the tokenizer.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="Text to measure it on.")] = None,
) -> None:
    """Report vocabulary, bytes per token and round-trip exactness."""
    from moe_lm.config.data import SourceConfig
    from moe_lm.tokenizer.tokenizer import Tokenizer
    from moe_lm.tokenizer.training import inspect

    named = {re.sub(r"[^A-Za-z0-9._-]", "-", file.name).lstrip(".-_") or "text": file for file in files or ()}
    sources = [SourceConfig(name=name, path=str(file)) for name, file in named.items()]
    print(inspect(Tokenizer.load(path), sources))


@app.command(rich_help_panel="Build")
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn documents into token shards, in parallel; goes on where it was stopped."""
    from moe_lm.config.reading import load_config
    from moe_lm.config.run import PretrainConfig

    settings = load_config(PretrainConfig, config, overrides or ())

    from rich.console import Console

    from moe_lm.common.terminal import byte_bar
    from moe_lm.data.prepare import prepare

    with byte_bar(Console(stderr=True), "tokenizing") as advance:
        report = prepare(settings.data, lambda progress: advance(progress.text_bytes, progress.total_bytes))
    print(report)


@app.command(rich_help_panel="Build")
def pretrain(ctx: typer.Context, config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a model; resumes by itself when the run folder has a checkpoint."""
    from moe_lm.config.reading import load_config
    from moe_lm.config.run import PretrainConfig

    settings = load_config(PretrainConfig, config, overrides or ())

    from moe_lm.train import cost, pretrain

    if dry_run:
        print(cost.describe(settings, settings.model))
    else:
        pretrain.run(settings, ctx.obj)


@app.command(rich_help_panel="Build")
def finetune(
    ctx: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    preview: Annotated[
        int | None,
        typer.Option("--preview", min=1, metavar="[N]", help="Show the first examples as they are trained on, stop."),
    ] = None,
) -> None:
    """Fine-tune a run on conversations, all weights or adapters; resumes like pretrain."""
    from moe_lm.config.reading import load_config
    from moe_lm.config.run import FinetuneConfig

    settings = load_config(FinetuneConfig, config, overrides or ())

    from moe_lm.train import finetune

    if preview is not None:
        finetune.preview(settings, preview)
    elif dry_run:
        print(finetune.describe(settings))
    else:
        finetune.run(settings, ctx.obj)


@app.command(rich_help_panel="Build")
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON; - is the terminal.")
    ] = None,
    world_sizes: Annotated[
        str | None, typer.Option(metavar="N,N", help="Numbers of processes; without, what fits of 1, 2 and 4.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layouts, each kind once.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="LAYOUT", help="This line of the table alone; may be repeated.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the processes of one world size may take.")] = 600,
    # For tests: a Python file that every process runs first, with which they plant errors.
    sabotage: Annotated[Path | None, typer.Option(hidden=True, exists=True, dir_okay=False)] = None,
) -> None:
    """Train a small copy of the model in every layout of parallelism and compare it with one process.

    CONFIG is that of a pretraining or a fine-tuning, with its adapters or preferences.
    """
    from moe_lm.config.reading import has_key, load_config
    from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig

    settings: RunConfig
    if has_key(config, "start_from"):
        settings = load_config(FinetuneConfig, config, overrides or ())
    else:
        settings = load_config(PretrainConfig, config, overrides or ())

    from moe_lm.tools.verify import parity

    raise typer.Exit(parity.run(settings, world_sizes, quick, only or (), json_file, timeout, sabotage))


cli_generate.add_to(app)
cli_serve.add_to(app)


@app.command("eval", rich_help_panel="Use")
def evaluate(
    run: RunPath,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILES]...", help="Text to score; without, the run's held-out text.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="New tokens a window scores; without, half of it.")] = None,
    base: Base = None,
) -> None:
    """Perplexity and bits per byte."""
    from moe_lm.evaluate import perplexity

    print(perplexity.evaluate(run, files or (), stride=stride, base=base))


cli_interop.add_to(app)
