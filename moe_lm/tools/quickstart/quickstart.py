"""The whole walk on one machine: tokenizer, shards, pretraining, evaluation, fine-tuning, samples.

The settings are the files `quickstart*.yaml` in `tokenizer/` and `configs/`; for a text of one's own the sizes are
those of sizes.py, and the walk ends without fine-tuning. This file has the order of the stages and the time that each
may take. Every stage resumes where it was stopped, and training goes on when it is given more time.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_lm.common.exits import STOPPED
from moe_lm.common.terminal import byte_bar
from moe_lm.config.data import SourceConfig, TokenizerRecipe
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards
from moe_lm.text.split import held_out
from moe_lm.tokenizer.training import train_tokenizer
from moe_lm.tools.docstrings import docstring_questions
from moe_lm.tools.quickstart.results import ANSWERED, CONTINUED, measure, metrics, show_samples, summarise
from moe_lm.tools.quickstart.setup import (
    CORPUS,
    PROJECT,
    SUMMARY,
    Setup,
    claim,
    compiled_if_possible,
    default_folder,
    done_steps,
    is_finished,
    new_config,
    overrides,
    preset_steps,
    read_seconds,
    saved_config,
    stage,
    with_train,
)  # fmt: skip
from moe_lm.tools.sizes import EPOCHS, Sizes
from moe_lm.train import finetune, pretrain
from moe_lm.train.timetable import LEAST_STEPS, Timetable

MINUTES = 8.0
FINETUNE_SHARE = 0.12  # of the minutes
SAMPLED = 33  # tokens that are trained on in the time that one is sampled, about
ENOUGH = 0.1  # of the minutes: with less time left, a finished walk does not go on


class StageStoppedError(Exception):
    """A signal ended a stage, after its checkpoint was written."""


def run(minutes: float | None, corpus: Path | None, run_dir: Path | None) -> None:
    """Walk from text to an evaluated model in about `minutes`, and write `run_dir/summary.json`.

    Without a corpus the text is Python's standard library, and the model is fine-tuned on questions about it. Raises
    UsageError when the corpus has no text or the folder is not for it.
    """
    run_dir = run_dir or default_folder(corpus)
    started = time.monotonic() - sum(read_seconds(run_dir).values())
    setup = Setup(run_dir, corpus, minutes or MINUTES, Console(), started)
    claim(setup)
    if is_finished(setup) and setup.seconds_left < ENOUGH * 60 * setup.minutes:
        setup.console.out((run_dir / SUMMARY).read_text(encoding="utf-8"), highlight=False)
        return
    try:
        with stage(setup, "tokenizer"):
            make_tokenizer(setup)
        with stage(setup, "shards"):
            config = make_shards(setup)
        with stage(setup, "pretrain"):
            config = do_pretrain(setup, config)
        with stage(setup, "evaluate"):
            figures = measure(setup, config)
        if corpus is None:
            with stage(setup, "finetune"):
                figures |= do_finetune(setup, config)
        with stage(setup, "samples"):
            samples = show_samples(setup, config)
    except StageStoppedError:  # training has printed how to resume
        sys.exit(STOPPED)
    summarise(setup, config, figures | {"samples": samples})


def make_tokenizer(setup: Setup) -> None:
    """Train the tokenizer on the documents that are not held out."""
    if (setup.tokenizer / "tokenizer.json").exists():
        return
    settings: dict[str, Any] = {"output": setup.tokenizer, "sources": [setup.source]}
    if setup.corpus is not None:
        settings["vocab_size"] = Sizes.of(SourceConfig(**setup.source)).vocab_size
    recipe = load_config(TokenizerRecipe, PROJECT / "tokenizer/quickstart-4k.yaml", overrides(settings))
    with byte_bar(setup.console, "reading and merging") as advance:
        train_tokenizer(recipe, lambda report: advance(report.text_bytes, None)).save(recipe.output)


def make_shards(setup: Setup) -> PretrainConfig:
    """Tokenize the corpus; returns the pretraining config, with as many steps as are worth while."""
    config = saved_config(setup) if (setup.pretrain_dir / "config.yaml").exists() else new_config(setup)
    most = config.data.sources[0].max_bytes
    if most is not None:
        setup.console.print(f"the first {most / 1e6:.1f} MB of the text, more than there is time to train on")
    with byte_bar(setup.console, "tokenizing") as advance:
        report = prepare(config.data, advance)
    setup.console.print(str(report), highlight=False, soft_wrap=True)
    return config


def do_pretrain(setup: Setup, config: PretrainConfig) -> PretrainConfig:
    """Pretrain for the time that the later stages leave; returns the config with the number of steps that fitted.

    A finished walk goes on at the peak rate, and lets it fall again (WSD-S, arXiv 2410.05192).
    """
    most = most_steps(setup, config)
    done, summary = done_steps(setup), setup.run_dir / SUMMARY
    if not done:
        config = with_train(config, steps=most)
    elif done >= config.train.steps:
        if not summary.exists():  # a later stage was stopped
            return config
        if done >= most:
            setup.console.print("the model has read the text as often as is worth while; a longer text teaches it more")
            return config
        summary.unlink()
        shutil.rmtree(setup.finetune_dir, ignore_errors=True)  # of the model so far
        allowed = config.checkpoint.model_copy(update={"allow_changes": True})
        config = with_train(config, steps=most, schedule=new_config(setup).train.schedule)
        config = config.model_copy(update={"checkpoint": allowed})
    ends = time.monotonic() + setup.seconds_left
    timetable = Timetable(ends, config.train, most, after=time_after(setup, config))
    if pretrain.run(config, timetable=timetable).stopped:
        raise StageStoppedError
    return saved_config(setup)


def most_steps(setup: Setup, config: PretrainConfig) -> int:
    """The steps that are worth while: those of the preset, or as many as read a text EPOCHS times."""
    if setup.corpus is None:
        return preset_steps(config)
    return max(LEAST_STEPS, EPOCHS * pretrain.num_windows(config) // config.train.global_batch_size)


def time_after(setup: Setup, config: PretrainConfig) -> Callable[[float], float]:
    """The seconds of what follows pretraining, given those of a step: evaluation, fine-tuning and samples."""
    shards = TokenShards.open(config.data.shards / CORPUS, "validation")
    step_tokens = config.train.global_batch_size * config.row_length
    evaluated = min(shards.num_tokens, (config.train.eval_batches or 0) * step_tokens)
    passes = evaluated + shards.num_tokens * (1 if setup.is_short else 2)  # each a third of a step's work
    sampled, share = CONTINUED, 0.0
    if setup.corpus is None:
        sampled, share = CONTINUED + ANSWERED, FINETUNE_SHARE
    tokens = passes / 3 + sampled * SAMPLED
    return lambda seconds_per_step: tokens / step_tokens * seconds_per_step + share * 60 * setup.minutes + 1.0


def do_finetune(setup: Setup, pretrained: PretrainConfig) -> dict[str, float]:
    """Fine-tune on questions about the functions of modules that were not held out; returns the held-out losses."""
    write_conversations(setup, pretrained.data.validation_fraction)
    saved = setup.finetune_dir / "config.yaml"
    if saved.exists():
        config = load_config(FinetuneConfig, saved)
    else:
        settings = {
            "run_dir": setup.finetune_dir,
            "start_from": setup.pretrain_dir,
            "data.train": [setup.chat_file("train")],
            "data.validation": [setup.chat_file("validation")],
            "train.global_batch_size": pretrained.train.global_batch_size,
        }
        config = load_config(FinetuneConfig, PROJECT / "configs/finetune/quickstart.yaml", overrides(settings))
        config = compiled_if_possible(setup, config)
    if setup.is_short:
        config = with_train(config, eval_batches=8)
    steps = (CONTINUED + ANSWERED) * SAMPLED / (config.train.global_batch_size * config.row_length)
    ends = time.monotonic() + setup.seconds_left
    timetable = Timetable(ends, config.train, after=lambda seconds_per_step: (steps + 1) * seconds_per_step)
    if finetune.run(config, timetable=timetable).stopped:
        raise StageStoppedError
    losses = [line["val_loss"] for line in metrics(setup.finetune_dir) if "val_loss" in line]
    return {"sft_val_loss_before": losses[0], "sft_val_loss_after": losses[-1]}


def write_conversations(setup: Setup, validation_fraction: float) -> None:
    """Write questions and answers as JSONL. A module that was held out of pretraining is held out here too."""
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for question in docstring_questions():
        split = "validation" if held_out(question.document_id, validation_fraction) else "train"
        lines[split].append(json.dumps(question.conversation, ensure_ascii=False) + "\n")
    for split, rows in lines.items():
        setup.chat_file(split).parent.mkdir(parents=True, exist_ok=True)
        setup.chat_file(split).write_text("".join(rows), encoding="utf-8")
    setup.console.print(f"{len(lines['train']):,} questions to train on, {len(lines['validation']):,} held out")
