"""The verb `config`: what editors read of the settings; and what a shell completes of them."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from moe_lm.cli.options import Verb

app = typer.Typer(no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.add_typer(app, name="config", help="Tell editors about the settings.", rich_help_panel="Start here")


@app.command(cls=Verb)
def schema(
    kind: Annotated[
        Literal["pretrain", "finetune", "tokenizer"],
        typer.Argument(metavar="[KIND]", help="Verb that reads the config."),
    ] = "pretrain",
) -> None:
    """Print the JSON schema of a config, with which editors complete and check it."""
    import json

    from moe_lm.config.schema import KINDS, schema_of

    print(json.dumps(schema_of(KINDS[kind]), indent=2))
    if not sys.stdout.isatty():
        line = f"# yaml-language-server: $schema={kind}.schema.json"
        print(f"kept as {kind}.schema.json, it serves a config beside it that begins with: {line}", file=sys.stderr)


def complete_setting(incomplete: str) -> list[str]:
    """The settings of a run that begin so, for the shell: `train.st` becomes `train.steps=`."""
    from moe_lm.config.findings import all_keys
    from moe_lm.config.run import FinetuneConfig, PretrainConfig

    keys = dict.fromkeys(key for kind in (PretrainConfig, FinetuneConfig) for key in all_keys(kind))
    sections = {key.rpartition(".")[0] for key in keys}
    return [f"{key}=" for key in keys if key.startswith(incomplete) and key not in sections]
