"""The verbs that build a model: tokenizer, prepare, plan, verify, import, upcycle; train.py has the two that train."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lm.cli.arguments import BasePath, ConfigPath, DType, Overrides, ProofMemory, RunPath, copying, gib, refuse
from moe_lm.cli.options import ConfigCommand, Verb, takes
from moe_lm.cli.train import finetune, pretrain, read_pretraining, read_run
from moe_lm.common import hub
from moe_lm.common.errors import UsageError
from moe_lm.common.process import to_type

if TYPE_CHECKING:
    from moe_lm.config.generation import UpcycleConfig
    from moe_lm.data.crew import Ranks
    from moe_lm.parallel.meeting import Meeting
    from moe_lm.text.files import Report

SECONDS_TO_MEET = 600.0  # for the ranks of `prepare`, which a launcher starts on many hosts

tokenizer_app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.add_typer(
        tokenizer_app,
        name="tokenizer",
        help="Train a byte-level BPE tokenizer, or measure one.",
        rich_help_panel="Build",
    )
    app.add_typer(data_app, name="data", help="Verify the token shards of a config.", rich_help_panel="Build")
    for verb in (prepare, plan, pretrain, finetune, verify):
        app.command(cls=ConfigCommand, rich_help_panel="Build")(verb)
    app.command("import", cls=Verb, rich_help_panel="Build")(import_)
    app.command(rich_help_panel="Build")(takes(how="UpcycleConfig")(upcycle))


@tokenizer_app.command("train", cls=ConfigCommand)
def tokenizer_train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that override the file's, like vocab_size=8192."),
    ] = None,
) -> None:
    """Train a tokenizer and write it to the recipe's output folder."""
    from moe_lm.config.data import TokenizerRecipe
    from moe_lm.config.reading import load_config

    settings = load_config(TokenizerRecipe, recipe, overrides or ())

    if (settings.output / "tokenizer.json").exists():
        raise UsageError(
            f"{settings.output} holds a tokenizer already, which shards and runs may belong to; set another output, or "
            "delete that folder"
        )

    from moe_lm.tokenizer.training import MEASURED_BYTES, inspect, train_tokenizer

    text_bytes = 0
    with copying("reading and merging", always=True) as tell:

        def progress(report: Report) -> None:
            nonlocal text_bytes
            text_bytes = report.text_bytes
            tell(text_bytes, None)

        trained = train_tokenizer(settings, progress)
    trained.save(settings.output)
    print(inspect(trained, settings.sources, share=MEASURED_BYTES / text_bytes))
    if trained.vocab_size < settings.vocab_size:
        print(
            f"the text gives {trained.vocab_size:,} ids of vocab_size={settings.vocab_size:,}: no other pair of tokens "
            "comes twice in it"
        )
    print(f"wrote {settings.output}")


@tokenizer_app.command("inspect", cls=Verb)
def tokenizer_inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the tokenizer, or a run with one.")],
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILES]...", help="Text files to measure it on.")
    ] = None,
) -> None:
    """Report vocabulary, bytes per token and round-trip exactness."""
    from moe_lm.checkpoint import checkpoint
    from moe_lm.config.data import SourceConfig
    from moe_lm.tokenizer.tokenizer import Tokenizer
    from moe_lm.tokenizer.training import inspect

    if checkpoint.is_there(path):
        path = checkpoint.verified_path(checkpoint.resolve(path), checkpoint.TOKENIZER)
    named = {re.sub(r"[^A-Za-z0-9._-]", "-", file.name).lstrip(".-_") or "text": file for file in files or ()}
    sources = [SourceConfig(name=name, path=str(file)) for name, file in named.items()]
    print(inspect(Tokenizer.load(path), sources))


def prepare(ctx: typer.Context, config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn documents into token shards, in parallel; resumes where it stopped."""
    settings = read_pretraining(config, overrides or [])

    from moe_lm.data.prepare import prepare

    ranks = together(ctx.obj)
    with (
        ctx.obj.lost_ranks_named() if ctx.obj is not None else nullcontext(),
        copying("tokenizing", always=ranks.rank == 0) as tell,
    ):
        report = prepare(settings.data, tell, ranks)
    if ranks.rank == 0:
        print(report)
    if ctx.obj is not None:
        ctx.obj.part()


def together(meeting: Meeting | None) -> Ranks:
    """What `prepare` needs of the ranks that a launcher started."""
    from moe_lm.data.crew import Ranks

    if meeting is None:
        return Ranks()
    meeting.assemble(SECONDS_TO_MEET)

    def first(mine: str) -> str:
        return meeting.of_first("prepare", mine)

    def check_same(mine: dict[str, str]) -> None:
        if difference := meeting.differences(mine):
            raise UsageError(f"{difference}; data.shards must be a folder that all hosts share", common=True)

    topology = meeting.topology
    return Ranks(topology.rank, topology.ranks_on_this_host, first, check_same, meeting.raise_failure)


@data_app.command("verify", cls=ConfigCommand)
def data_verify(ctx: typer.Context, config: ConfigPath, overrides: Overrides = None) -> None:
    """Check every shard's contents against its checksums and the vocabulary; exit code 1 if one is damaged.

    A launcher may start it on many ranks, as it starts training: each reads its share.
    """
    settings = read_pretraining(config, overrides or [])

    from moe_lm.parallel.topology import current_topology
    from moe_lm.tools import data_verify

    damaged, is_main = False, current_topology().is_main
    with copying("verifying", always=is_main) as tell:
        found = list(data_verify.run(settings, ctx.obj, tell))
    for what, damages in found:
        damaged |= bool(damages)
        for line in [f"{what}: {'damaged: ' + str(len(damages)) if damages else 'sound'}", *damages.values()]:
            if is_main:
                print(line)
    raise typer.Exit(int(damaged))


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of devices; default: the smallest that the config's expert parallelism allows."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Device: a name of the table (default: h100), cpu for this machine, or a YAML file."
        ),
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="NAME", help="Network between nodes; default: the device's usual one.")
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Override a rate of the device, like dense=600e12; may be repeated."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Plan for this machine's device, at the speed that it is measured to have."),
    ] = False,
    tokens: Annotated[float | None, typer.Option(min=1, help="Tokens to train on; default: the config's.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device-hour, in any currency.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="File to write every figure to as JSON; -: stdout.")
    ] = None,
) -> None:
    """Predict memory, time and cost of a run on any number of GPUs, and its best layout, without one.

    CONFIG is a pretraining config, or one that fine-tunes all weights.
    """
    settings = read_run(config, overrides or [])

    from moe_lm.config.run import PretrainConfig
    from moe_lm.tools.plan import plan
    from moe_lm.train import finetune, pretrain

    plan.check_planned(settings)
    settings = pretrain.resolved(settings) if isinstance(settings, PretrainConfig) else finetune.resolved(settings)
    verb = "pretrain" if isinstance(settings, PretrainConfig) else "finetune"
    command = to_type(verb, config, *(overrides or ()))
    model = finetune.trained_model(settings)
    code = plan.run(settings, model, command, gpus, gpu, network, rate or (), measure, tokens, price, json_file)
    raise typer.Exit(code)


def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="File to write every figure to as JSON; -: stdout.")
    ] = None,
    world_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="World sizes to test; default: those of 1, 2 and 4 that fit."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run one layout of each kind.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYOUT", help="Run only this layout, a name from the table; may be repeated."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit of each world size, in seconds.")] = 600,
    # For tests: a Python file that every process runs first, with which they plant errors.
    sabotage: Annotated[Path | None, typer.Option(hidden=True, exists=True, dir_okay=False)] = None,
) -> None:
    """Check every parallel layout of a config, on a small copy of its model, against a single process.

    CONFIG is a pretraining or fine-tuning config, LoRA and DPO included.
    """
    settings = read_run(config, overrides or [])

    from moe_lm.tools.verify import parity

    raise typer.Exit(parity.run(settings, world_sizes, quick, only or (), json_file, timeout, sabotage))


def import_(
    hf_dir: Annotated[
        Path,
        typer.Argument(
            metavar="HF_DIR",
            parser=hub.typed_path,
            help="Folder with config.json, safetensors and a tokenizer; or a name on the hub, like Qwen/Qwen3-0.6B.",
        ),
    ],
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder to write; default: runs/ and the last part of the name.")
    ] = None,
    dtype: DType = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder or name on the hub, if it is not in HF_DIR.")
    ] = None,
    proof_memory: ProofMemory = None,
    base: Annotated[Path | None, typer.Option(help="For a PEFT adapter: the run that it was trained on.")] = None,
) -> None:
    """Convert a Hugging Face checkpoint or a PEFT adapter into a run; checks that the logits match."""
    target = run_dir or Path("runs") / hf_dir.resolve().name.partition("@")[0]
    hf_dir = hub.local_folder(hf_dir, hub.MODEL_FILES)
    tokenizer = tokenizer and hub.local_folder(tokenizer, hub.TOKENIZER_FILES, enough="tokenizer.json")
    if (hf_dir / "adapter_config.json").is_file():
        from moe_lm.tools.interop.peft_adapter import import_adapter

        refuse({"--dtype": dtype, "--tokenizer": tokenizer, "--proof-memory": proof_memory}, f"the adapter in {hf_dir}")
        print(import_adapter(hf_dir, base, target))
    elif base is not None:
        raise UsageError(f"{hf_dir} holds no adapter_config.json, so it needs no --base; leave {base} out")
    else:
        from moe_lm.tools.interop.importing import import_folder

        with copying("importing") as tell:
            print(import_folder(hf_dir, target, dtype, tokenizer, gib(proof_memory), tell))
    print(f"wrote {target}")


def upcycle(
    run: RunPath,
    how: UpcycleConfig,
    run_dir: Annotated[Path, typer.Option(help="Run folder to write.")],
    base: BasePath = None,
    proof_memory: ProofMemory = None,
) -> None:
    """Turn a dense run into a Mixture of Experts; checks that the outputs are the same."""
    from moe_lm.tools.interop import upcycle

    print(upcycle.upcycle(run, run_dir, how, base, gib(proof_memory)))
    print(f"wrote {run_dir}")
