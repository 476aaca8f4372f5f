"""The verbs that carry models to and from Hugging Face, and from dense to sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_lm.common.errors import UsageError
from moe_lm.common.signals import ended_by_sigterm

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in it.")]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="Of the weights; without, what they are in. Router biases stay float32."),
]
BasePath = Annotated[
    Path | None, typer.Option("--base", help="Where the base of an adapter is now, when it has moved.")
]
ProofMemory = Annotated[
    float | None, typer.Option(min=0, help="GiB for comparing logits; without, half of the free memory.")
]


def add_to(app: typer.Typer) -> None:
    """Put the verbs behind those that are there. What writes a folder takes it away when it is ended."""
    app.command("import", rich_help_panel="Build")(ended_by_sigterm()(import_))
    app.command(rich_help_panel="Build")(ended_by_sigterm()(upcycle))
    app.command(rich_help_panel="Use")(ended_by_sigterm()(export))


def import_(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder of config.json, safetensors and tokenizer.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="The new run folder; without, runs/ and the folder's name.")
    ] = None,
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, where it is another one.")] = None,
    proof_memory: ProofMemory = None,
    base: Annotated[Path | None, typer.Option(help="Of an adapter of peft's: the run that it stands beside.")] = None,
) -> None:
    """Make a run of a Hugging Face folder, proven equal, or of an adapter of peft's."""
    target = run_dir or Path("runs") / hf_dir.resolve().name
    if (hf_dir / "adapter_config.json").is_file():
        from moe_lm.tools.interop.peft_adapter import import_adapter

        _refuse(
            {"--dtype": dtype, "--tokenizer": tokenizer, "--proof-memory": proof_memory}, f"the adapter in {hf_dir}"
        )
        print(import_adapter(hf_dir, base, target))
        print(f"wrote {target}")
        return
    if base is not None:
        raise UsageError(f"{hf_dir} holds no adapter_config.json, so it needs no --base; leave {base} out")
    from moe_lm.tools.interop.importing import import_folder

    with _bar("importing") as tell:
        proof = import_folder(hf_dir, target, dtype, tokenizer, _gib(proof_memory), tell)
    print(proof)
    print(f"wrote {target}")


def upcycle(
    run: RunPath,
    run_dir: Annotated[Path, typer.Option(help="The new run folder.")],
    experts: Annotated[int, typer.Option(min=1, help="Routed experts of a layer.")] = 8,
    per_token: Annotated[int, typer.Option(min=1, help="Of these, how many a token chooses.")] = 2,
    split: Annotated[int, typer.Option(min=1, help="Pieces that a feed-forward layer is cut into; 1: copies.")] = 1,
    shared: Annotated[int, typer.Option(min=0, help="Of the pieces, how many every token passes through.")] = 0,
    first_dense: Annotated[int, typer.Option(min=0, help="This many first layers stay dense.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the new router.")] = 1234,
    base: BasePath = None,
    proof_memory: ProofMemory = None,
) -> None:
    """Make a Mixture of Experts of a dense run, proven to compute the same before any step."""
    from moe_lm.tools.interop.upcycle import Upcycling
    from moe_lm.tools.interop.upcycle import upcycle as make

    how = Upcycling(experts, per_token, split, shared, first_dense, seed)
    print(make(run, run_dir, how, base, _gib(proof_memory)))
    print(f"wrote {run_dir}")


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    family: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FAMILY", help="Like dots1, or peft for adapters; without, the nearest that fits."
        ),
    ] = None,
    dtype: Dtype = None,
    base: BasePath = None,
    proof_memory: ProofMemory = None,
) -> None:
    """Make a Hugging Face folder of a run, proven equal; for transformers, vLLM, llama.cpp, peft."""
    if family == "peft":
        from moe_lm.tools.interop.peft_adapter import export_adapter

        _refuse({"--dtype": dtype, "--proof-memory": proof_memory}, "--format peft")
        print(export_adapter(run, out, base))
        print(f"wrote {out}")
        return
    from moe_lm.tools.interop.exporting import export_run

    with _bar("exporting") as tell:
        proof = export_run(run, out, family, dtype, base, _gib(proof_memory), tell=tell)
    print(proof)
    print(f"wrote {out}")


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for who looks at a terminal."""
    from rich.console import Console

    from moe_lm.common.terminal import byte_bar

    console = Console(stderr=True)
    if console.is_terminal:
        with byte_bar(console, title) as advance:
            yield advance
    else:
        yield lambda done, total: None


def _refuse(options: dict[str, object], where: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {value} has no meaning for {where}; leave it out")


def _gib(value: float | None) -> int | None:
    return None if value is None else int(value * 2**30)
