"""The verbs that train, pretrain and finetune: read the config, check it, and run it in one process or in several."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lm.cli.arguments import ConfigPath, Overrides, copying, refuse
from moe_lm.common.errors import UsageError
from moe_lm.common.exits import STOPPED
from moe_lm.common.process import this_command, to_type

if TYPE_CHECKING:
    from moe_lm.config.model import ModelConfig
    from moe_lm.config.run import PretrainConfig, RunConfig
    from moe_lm.parallel.topology import Topology
    from moe_lm.train.preflight import Fit, Verdict
    from moe_lm.train.result import TrainingResult

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check config, layout, memory and disk, show sizes and steps, and stop. What a machine lacks that the run "
        "would not be on is a line (not here), not an error: name its device with --gpu.",
    ),
]
Settings = Annotated[
    bool, typer.Option("--settings", help="With --dry-run: show every setting too, and those of DeepSpeed.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        min=1,
        metavar="N",
        help="Start this many processes on this machine; with --dry-run: check for a run of so many, wherever.",
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option("--gpus", metavar="all|N", help="Start a process on each GPU of this machine, or on N of them."),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="With --dry-run: check for this device, as named by moe-lm plan."),
]


def pretrain(
    ctx: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    settings_too: Settings = False,
    gpus: Gpus = None,
    processes: Processes = None,
    gpu: Gpu = None,
) -> None:
    """Train a model; resumes by itself when the run folder has a checkpoint."""
    settings = read_pretraining(config, overrides or [])
    count = number_of_processes(gpus, processes, settings)
    if not dry_run:
        refuse({"--gpu": gpu}, "a run that starts, which has the devices that are here")
        asked = {"--gpus": gpus, "--processes": processes}
        start_processes(["pretrain", str(config), *(overrides or ())], count, settings, asked)

    from moe_lm.train import pretrain

    if dry_run:
        print(pretrain.describe(settings, started_as(count), fit_on(gpu), settings_too))
    else:
        check_export(settings)
        end_with(pretrain.run(settings, ctx.obj, fit_here), settings)


def number_of_processes(gpus: str | None, processes: int | None, config: RunConfig) -> int | None:
    """How many processes are asked for, with `--gpus` or `--processes`."""
    if gpus is None:
        return processes
    if config.parallel.device == "cpu":
        raise UsageError(
            f"--gpus {gpus} and parallel.device=cpu contradict each other; leave one of them out, or start processes "
            "on the CPU, as with --processes 2"
        )
    if processes is not None:
        raise UsageError(f"--gpus {gpus} and --processes {processes} both say how many; give one of them")
    import torch

    here = torch.cuda.device_count()
    if not here:
        raise UsageError(
            f"--gpus {gpus}: there is no GPU here (moe-lm doctor says what there is); leave it out, or start processes "
            "on the CPU, as with --processes 2"
        )
    if gpus != "all" and (not gpus.isdecimal() or not 1 <= int(gpus) <= here):
        raise UsageError(f"--gpus {gpus}: this machine has {here}; give a number from 1 to {here}, or all")
    return here if gpus == "all" else int(gpus)


def start_processes(command: list[str], processes: int | None, config: RunConfig, asked: Mapping[str, object]) -> None:
    """Go on as a launcher of this many processes, if several are asked for; else say which GPUs have nothing to do.

    `asked` are the options that asked for them, which a rank of a launcher refuses.
    """
    from moe_lm.parallel.topology import current_topology

    if current_topology().world_size > 1:
        refuse(asked, "a run that a launcher started, which has the processes of the launcher")
    elif processes is not None and processes > 1:
        from moe_lm.parallel.torchrun import replace_this_process

        replace_this_process(processes, command)
    elif processes is None and config.parallel.device in ("auto", "cuda"):
        import torch

        if (idle := torch.cuda.device_count() - 1) > 0:
            print(
                f"this run has 1 of the {idle + 1} GPUs that are here; for all of them: {this_command()} --gpus all",
                file=sys.stderr,
            )


def started_as(processes: int | None) -> Topology:
    """The topology of this process, or of one in a run of this many."""
    from moe_lm.parallel.topology import current_topology

    topology = current_topology()
    return topology if processes is None else replace(topology, world_size=processes)


def fit_on(gpu: str | None) -> Fit:
    """Weighs the memory of a step on a device, or on the one that is here."""
    from functools import partial

    from moe_lm.tools.plan.plan import fit

    return partial(fit, gpu=gpu)


def fit_here(config: RunConfig, model: ModelConfig, topology: Topology) -> Verdict:
    """Weighs the memory of a step of a run that starts, on the device that is here."""
    from moe_lm.tools.plan.plan import fit

    return fit(config, model, topology, searches=False)


def check_export(config: RunConfig) -> None:
    """Raise UsageError for a model that no family can hold, if it is to be exported at the end."""
    if config.checkpoint.export is not None:
        from moe_lm.tools.interop.fitting import nearest_family
        from moe_lm.train.finetune import trained_model

        nearest_family(trained_model(config))


def end_with(result: TrainingResult, config: RunConfig) -> None:
    """Export what is finished, and exit with the code for schedulers: a run that a signal stopped has not finished."""
    if result.stopped:
        raise typer.Exit(STOPPED)
    from moe_lm.parallel.topology import current_topology

    if config.checkpoint.export is not None and current_topology().is_main:
        export_at_end(config.run_dir, result.step)


def export_at_end(run_dir: Path, step: int) -> None:
    """Write the newest checkpoint as a Hugging Face folder; if that fails, the run is saved all the same."""
    from moe_lm.tools.interop.exporting import export_run

    out = run_dir / "export" / f"step-{step:08d}"
    if out.exists():  # a run that was finished before
        return
    try:
        with copying("exporting") as tell:
            export_run(run_dir, out, tell=tell)
    except Exception as error:
        again = to_type("export", run_dir, out)
        print(f"the run is saved, but not exported: {error}; to try again: {again}", file=sys.stderr)
    else:
        print(f"exported to {out}, for transformers and vLLM", file=sys.stderr)


def finetune(
    ctx: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    settings_too: Settings = False,
    gpus: Gpus = None,
    processes: Processes = None,
    gpu: Gpu = None,
    preview: Annotated[
        int | None,
        typer.Option("--preview", min=1, metavar="[N]", help="Show the first examples with their masks, and stop."),
    ] = None,
) -> None:
    """Fine-tune a run on conversations or preferences, all weights or adapters; resumes like pretrain."""
    from moe_lm.config.reading import load_config
    from moe_lm.config.run import FinetuneConfig

    settings = load_config(FinetuneConfig, config, overrides or ())
    count = number_of_processes(gpus, processes, settings)
    if not dry_run and preview is None:
        refuse({"--gpu": gpu}, "a run that starts, which has the devices that are here")
        asked = {"--gpus": gpus, "--processes": processes}
        start_processes(["finetune", str(config), *(overrides or ())], count, settings, asked)

    from moe_lm.train import finetune

    if preview is not None and dry_run:
        raise UsageError("--preview and --dry-run both show something and stop; give one of them")
    is_planned = settings.lora is None and settings.preference is None
    if preview is not None:
        finetune.preview(settings, preview)
    elif dry_run:
        if not is_planned:
            refuse({"--gpu": gpu}, "adapters and preferences, of which only weights, gradients and moments are known")
        weighs = fit_on(gpu) if is_planned else None
        print(finetune.describe(settings, started_as(count), weighs, settings_too))
    else:
        check_export(settings)
        end_with(finetune.run(settings, ctx.obj, fit_here if is_planned else None), settings)


def read_run(config: Path, overrides: list[str]) -> RunConfig:
    """The config of a pretraining or a fine-tuning, whichever the file describes."""
    from moe_lm.config.reading import kind_of, load_config
    from moe_lm.config.run import FinetuneConfig

    if kind_of(config) is FinetuneConfig:
        return load_config(FinetuneConfig, config, overrides)
    return read_pretraining(config, overrides)


def read_pretraining(config: Path, overrides: list[str]) -> PretrainConfig:
    """The config of a pretraining, whole, and fitting its start if it has one; only a start needs torch."""
    from moe_lm.config.reading import load_config
    from moe_lm.config.run import PretrainConfig

    def completed(values: dict[str, Any]) -> dict[str, Any]:
        from moe_lm.train import start

        return start.completed(values)

    settings = load_config(PretrainConfig, config, overrides, completed)
    if settings.start_from is not None:
        from moe_lm.train import start

        start.find(settings)  # for verbs that only read the config; training looks again, and keeps what it finds
    return settings
