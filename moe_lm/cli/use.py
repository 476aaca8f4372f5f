"""The verbs that use a model: sample, chat, explain, serve, eval, report, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_lm.cli.arguments import BasePath, DType, ProofMemory, RunPath, copying, counting, gib, refuse
from moe_lm.cli.options import Verb, takes
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.process import how_to_install
from moe_lm.common.signals import ctrl_c_as_exception
from moe_lm.common.terminal import check_typed
from moe_lm.kernels.native import build as native

if TYPE_CHECKING:
    from moe_lm.config.generation import (
        CompiledLoadConfig,
        GenerationConfig,
        LoadConfig,
        NeedleConfig,
        SampleConfig,
        ServeConfig,
        TasksConfig,
    )
    from moe_lm.generate.sample import Prompt


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line. In a chat, Ctrl-C ends the answer."""
    use = "Use"
    app.command(rich_help_panel=use)(takes(options="SampleConfig", load="CompiledLoadConfig")(sample))
    app.command(rich_help_panel=use)(takes(options="GenerationConfig", load="LoadConfig")(ctrl_c_as_exception()(chat)))
    app.command(cls=Verb, rich_help_panel=use)(explain)
    app.command(rich_help_panel=use)(takes(server="ServeConfig", load="CompiledLoadConfig")(serve))
    app.command("eval", rich_help_panel=use)(takes(tasks="TasksConfig", needle="NeedleConfig")(evaluate))
    app.command(cls=Verb, rich_help_panel=use)(report)
    app.command(cls=Verb, rich_help_panel=use)(export)


def _typed(prompt: str | None) -> str | None:
    if prompt is not None:
        check_typed("--prompt", prompt)
    return prompt


Truncate = Annotated[Literal["left"] | None, typer.Option(help="Cut a prompt that is too long at its beginning.")]


def sample(
    run: RunPath,
    options: SampleConfig,
    load: CompiledLoadConfig,
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="-: read the prompt from stdin.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", callback=_typed, help="Text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(help='File of prompts, one JSON line each: "text" or {"prompt": "text"}; -: stdin.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write JSON lines to.")] = None,
    truncate: Truncate = None,
) -> None:
    """Continue a prompt, streaming; many prompts or samples become JSON lines."""
    _check_source(stdin, prompt, file)
    if load.compile and options.beams is not None:
        raise UsageError("--compile and --beams do not go together; leave one of them out")

    native.start()
    from moe_lm.generate.sample import Prompt, write_samples
    from moe_lm.generate.session import Session

    prompts = [Prompt(prompt)] if prompt is not None else _read(stdin, file)
    one = len(prompts) == 1 and options.num == 1 and file is None and out is None
    shown = options.show_routing is None or sys.stdout.isatty()
    plain = one and options.beams is None and options.logprobs is None and shown
    session = Session.open(run, load, load.compile)
    write_samples(session, prompts, options, truncate is not None, out, plain)


def _check_source(stdin: str | None, prompt: str | None, file: Path | None) -> None:
    given = [name for name, value in (("-", stdin), ("--prompt", prompt), ("--file", file)) if value is not None]
    if len(given) != 1:
        said = " and ".join(given) or "nothing"
        raise UsageError(f"{said} given to continue; expected one of --prompt TEXT, --file FILE and -")
    if stdin not in (None, "-"):
        raise UsageError(f"{stdin} is not a source of a prompt; give --prompt TEXT, --file FILE or - for stdin")


def _read(stdin: str | None, file: Path | None) -> list[Prompt]:
    from moe_lm.generate.sample import Prompt, read_prompts, read_text

    if file is not None:
        return read_prompts(file)
    return [Prompt(read_text(Path(str(stdin))).removesuffix("\n"))]


def chat(
    run: RunPath,
    options: GenerationConfig,
    load: LoadConfig,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep the lines you type in ~/.local/state/moe-lm.")
    ] = True,
) -> None:
    """Talk to a fine-tuned run; /help lists the commands of the chat."""
    native.start()
    from moe_lm.generate import chat
    from moe_lm.generate.decode import Settings

    chat.chat(run, Settings.of(options), load, history)


def explain(
    run: RunPath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", callback=_typed, help="Text to look at.")],
    out: Annotated[Path, typer.Option(help="File of the picture: .png, .svg or .pdf.")] = Path("explain.png"),
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,3", help="Draw only these layers, counted from 0; default: up to 6 that stay readable."
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar="0,3", help="Draw only these heads, counted from 0; default: up to 8 that stay readable."),
    ] = None,
    truncate: Truncate = None,
    base: BasePath = None,
) -> None:
    """Draw what the model attends to, and which experts took each token."""
    chosen_layers, chosen_heads = _numbers("layers", layers), _numbers("heads", heads)

    from moe_lm.tools.explain import explain

    explain.explain(run, prompt, out, chosen_layers, chosen_heads, truncate is not None, base)


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{option} {text} is not a list of numbers; give them like 0,3") from error


def serve(run: RunPath, server: ServeConfig, load: CompiledLoadConfig) -> None:
    """Answer OpenAI's clients over HTTP, and serve a chat page."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MoeLmError(f"serve needs {error.name}, which is not installed; {how_to_install('serve')}") from error

    native.start()
    from moe_lm.tools.serve.server import serve

    serve(run, server, load)


def evaluate(
    run: RunPath,
    tasks: TasksConfig,
    needle: NeedleConfig,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILES]...", help="Text files to score; default: the run's held-out text."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens scored per window; default: half of a window.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window; default: the sequence length of the training.")
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also show the loss by position: what a longer context is worth.")
    ] = False,
    base: BasePath = None,
) -> None:
    """Measure perplexity and bits per byte on text, retrieval of a fact (--needle), or accuracy on tasks (--tasks)."""
    of_text: dict[str, object] = {"--stride": stride, "--window": window, "--by-position": by_position or None}
    if tasks.tasks:
        given: dict[str, object] = {"FILES": " ".join(map(str, files or ())) or None, "--needle": needle.needle or None}
        refuse(given | of_text, "--tasks")
        from moe_lm.evaluate.tasks import evaluate_tasks, table

        with counting("answering") as tell:
            results = evaluate_tasks(run, tasks, base, tell)
        print(table(results))
        if tasks.output is not None:
            print(f"wrote {tasks.output}")
        return
    if needle.needle:
        refuse(of_text, "--needle")
        from moe_lm.evaluate.needle import evaluate_needle

        with counting("reading texts") as tell:
            found = evaluate_needle(run, needle, files or (), base, tell)
        print(found)
        return
    if by_position:
        refuse({"--stride": stride}, "--by-position, whose windows do not overlap")
    from moe_lm.evaluate import perplexity

    with counting("scoring tokens") as tell:
        score = perplexity.evaluate(run, files or (), stride, base, window, by_position, tell)
    print(score)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="Folders of runs that have begun.")],
    out: Annotated[
        Path | None, typer.Option(help="Page to write; default: report.html in the run folder, of several runs here.")
    ] = None,
) -> None:
    """Make an HTML page of a run, or of several in the same charts: what happened, and what looks wrong."""
    from moe_lm.tools.report.report import report

    print(f"wrote {report(runs, out)}")


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist yet.")],
    family: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FAMILY",
            help="Target family, like dots1, or peft for adapters; default: the closest match.",
        ),
    ] = None,
    dtype: DType = None,
    base: BasePath = None,
    proof_memory: ProofMemory = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="With --format peft: folder or hub name of the exported base, for peft to find."
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to this repository of the Hugging Face hub."),
    ] = None,
) -> None:
    """Write a run as a Hugging Face folder for transformers, vLLM, llama.cpp or peft; checks that the logits match."""
    from moe_lm.common import hub

    if push is not None:
        hub.check_can_push(push)
    if family == "peft":
        from moe_lm.tools.interop.peft_adapter import export_adapter

        refuse({"--dtype": dtype, "--proof-memory": proof_memory}, "--format peft")
        print(export_adapter(run, out, base, base_name))
    else:
        from moe_lm.tools.interop.exporting import export_run

        refuse({"--base-name": base_name}, "a whole model; it is for --format peft")
        with copying("exporting") as tell:
            print(export_run(run, out, family, dtype, base, gib(proof_memory), tell=tell))
    print(f"wrote {out}")
    if push is not None:
        print(f"pushed to {hub.push(out, push)}")
