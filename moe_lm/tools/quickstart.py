"""The whole walk on one machine: tokenizer, shards, pretraining, fine-tuning, samples, evaluation.

The settings are the files `quickstart*.yaml` in `tokenizer/` and `configs/`. This file has the order of the stages,
the time that training may take, and the output. Every stage resumes where it was stopped.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_lm.common.exits import STOPPED
from moe_lm.common.process import this_program
from moe_lm.common.terminal import byte_bar
from moe_lm.config.data import TokenizerRecipe
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards
from moe_lm.evaluate.perplexity import evaluate, unigram_bits_per_byte, xz_bits_per_byte
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.generate.text import Delta
from moe_lm.kernels.device import compiling_needs, pick_device
from moe_lm.model.size import count_parameters
from moe_lm.text.split import held_out
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tokenizer.training import train_tokenizer
from moe_lm.tools.docstrings import docstring_questions
from moe_lm.train import finetune, pretrain

PROJECT = Path(__file__).parents[2]
CORPUS = "corpus"  # the name of the source, and so of its shards
MINUTES = 8.0
PRETRAIN_SHARE, FINETUNE_SHARE = 0.68, 0.08  # of the minutes
CONTINUE = Settings(max_new_tokens=80, sampling=Sampling(temperature=0.7, top_p=0.9), seed=1)
ANSWER = Settings(max_new_tokens=60, sampling=GREEDY)
PROMPTS = ("def read_file(path):\n", "class Stack:\n")  # that the pretrained model continues
MIN_STEPS = 8
QUESTIONS = 4  # held out, which the fine-tuned model answers

ConfigT = TypeVar("ConfigT", PretrainConfig, FinetuneConfig)


class StageStoppedError(Exception):
    """A signal ended a stage, after its checkpoint was written."""


@dataclass(frozen=True)
class Setup:
    """The run's folder, the text to train on, the minutes that it may take, and the terminal."""

    run_dir: Path
    sources: list[dict[str, Any]]
    minutes: float
    console: Console

    @property
    def tokenizer(self) -> Path:
        return self.run_dir / "tokenizer"

    @property
    def pretrain_dir(self) -> Path:
        return self.run_dir / "pretrain"

    @property
    def finetune_dir(self) -> Path:
        return self.run_dir / "finetune"

    def chat_file(self, split: str) -> Path:
        return self.run_dir / "chat" / f"{split}.jsonl"


def run(minutes: float | None, corpus: Path | None, run_dir: Path) -> None:
    """Walk from text to an evaluated, fine-tuned model in about `minutes`, and write `run_dir/summary.json`.

    The corpus is the text in `corpus`, by default Python's standard library. Raises UsageError when it has no text.
    """
    source = {"stdlib": True} if corpus is None else {"path": corpus}
    setup = Setup(run_dir, [{"name": CORPUS, **source}], minutes or MINUTES, Console())
    try:
        with stage(setup, "tokenizer"):
            make_tokenizer(setup)
        with stage(setup, "shards"):
            config = make_shards(setup)
        with stage(setup, "pretrain"):
            config = do_pretrain(setup, config)
        with stage(setup, "finetune"):
            do_finetune(setup, config)
        with stage(setup, "samples"):
            samples = show_samples(setup, config)
        with stage(setup, "evaluate"):
            figures = measure(setup, config)
    except StageStoppedError:  # training has printed how to resume
        sys.exit(STOPPED)
    summarise(setup, config, figures | {"samples": samples})


def make_tokenizer(setup: Setup) -> None:
    """Train the tokenizer on the documents that are not held out."""
    if (setup.tokenizer / "tokenizer.json").exists():
        return
    settings = overrides({"output": setup.tokenizer, "sources": setup.sources})
    recipe = load_config(TokenizerRecipe, PROJECT / "tokenizer/quickstart-4k.yaml", settings)
    with byte_bar(setup.console, "reading and merging") as advance:
        train_tokenizer(recipe, lambda report: advance(report.text_bytes, None)).save(recipe.output)


def make_shards(setup: Setup) -> PretrainConfig:
    """Tokenize the corpus; returns the pretraining config, whose steps are not fitted to the time yet."""
    preset = "quickstart-cuda" if torch.cuda.is_available() else "quickstart"
    settings = {
        "run_dir": setup.pretrain_dir,
        "data.tokenizer": setup.tokenizer,
        "data.shards": setup.run_dir / "shards",
        "data.sources": setup.sources,
    }
    config = load_config(PretrainConfig, PROJECT / f"configs/pretrain/{preset}.yaml", overrides(settings))
    config = compiled_if_possible(setup, config)
    with byte_bar(setup.console, "tokenizing") as advance:
        report = prepare(config.data, advance)
    setup.console.print(str(report), highlight=False)
    return config


def do_pretrain(setup: Setup, config: PretrainConfig) -> PretrainConfig:
    """Pretrain for PRETRAIN_SHARE of the time; returns the config with the number of steps that fits."""
    saved = setup.pretrain_dir / "config.yaml"
    if saved.exists():
        config = load_config(PretrainConfig, saved)
    else:
        setup.console.print("measuring the time of a step, after torch.compile ...")
        seconds = pretrain.seconds_per_step(config)
        config = with_steps(config, int(PRETRAIN_SHARE * setup.minutes * 60 / seconds))
    if pretrain.run(config).stopped:
        raise StageStoppedError
    return config


def do_finetune(setup: Setup, pretrained: PretrainConfig) -> None:
    """Fine-tune on questions about the functions of modules that were not held out."""
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
        }
        config = load_config(FinetuneConfig, PROJECT / "configs/finetune/quickstart.yaml", overrides(settings))
        tokens = config.train.global_batch_size * config.data.sequence_length
        seconds = tokens / median_speed(setup.pretrain_dir)
        config = compiled_if_possible(setup, config)
        config = with_steps(config, int(FINETUNE_SHARE * setup.minutes * 60 / seconds))
    if finetune.run(config).stopped:
        raise StageStoppedError


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


def show_samples(setup: Setup, config: PretrainConfig) -> list[dict[str, str]]:
    """Print the pretrained model's continuations and the fine-tuned model's answers as they are generated."""
    samples = []
    session = Session.load(setup.pretrain_dir, device=config.parallel.device)
    for prompt in PROMPTS:
        text = show(setup, prompt, session.complete(prompt, CONTINUE))
        samples.append({"model": "pretrain", "prompt": prompt, "text": text})
    session = Session.load(setup.finetune_dir, device=config.parallel.device)
    rows = [json.loads(line)["messages"] for line in setup.chat_file("validation").read_text("utf-8").splitlines()]
    for question, reference in rows[:: max(1, len(rows) // QUESTIONS)][:QUESTIONS]:
        text = show(setup, question["content"] + "\n", session.chat([question], ANSWER))
        shown = {"prompt": question["content"], "text": text, "reference": reference["content"]}
        samples.append({"model": "finetune"} | shown)
    return samples


def show(setup: Setup, prompt: str, deltas: Iterable[Delta]) -> str:
    """Stream a text to the terminal, after its prompt."""
    setup.console.print(prompt, style="bold", end="", markup=False, highlight=False)
    text = ""
    for delta in deltas:
        setup.console.out(delta.text, end="", highlight=False)
        text += delta.text
    setup.console.print("\n")
    return text


def measure(setup: Setup, config: PretrainConfig) -> dict[str, Any]:
    """Bits per byte of the held-out documents: by the model, by xz, by token frequencies."""
    evaluation = evaluate(setup.pretrain_dir)
    tokenizer = Tokenizer.load(setup.tokenizer)
    train, validation = (
        TokenShards.open(config.data.shards / CORPUS, split, verify=False) for split in ("train", "validation")
    )
    counts = np.bincount(train.tokens(0, train.num_tokens), minlength=tokenizer.vocab_size)
    counts[tokenizer.bos_id] = 0
    predicted = validation.tokens(0, validation.num_tokens)
    text = tokenizer.decode(predicted.tolist()).encode()
    predicted = predicted[predicted != tokenizer.bos_id]
    return {
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_perplexity": evaluation.perplexity,
        "val_bytes": evaluation.text_bytes,
        "val_documents": evaluation.documents,
        "xz_bits_per_byte": xz_bits_per_byte(text),
        "unigram_bits_per_byte": unigram_bits_per_byte(counts, predicted, validation.text_bytes),
    }


def summarise(setup: Setup, config: PretrainConfig, figures: dict[str, Any]) -> None:
    """Write summary.json, print the table and the commands to try next."""
    parameters = count_parameters(config.model)
    losses = [line["val_loss"] for line in metrics(setup.finetune_dir) if "val_loss" in line]
    summary = {
        "seconds": read_seconds(setup),
        "tokens_per_second": median_speed(setup.pretrain_dir),
        "pretrain_tokens": sum(line["tokens"] for line in metrics(setup.pretrain_dir)),
        **figures,
        "sft_val_loss_before": losses[0],
        "sft_val_loss_after": losses[-1],
        "params_total": parameters.total,
        "params_active": parameters.active,
        "device": pick_device(config.parallel.device).type,
    }
    (setup.run_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    table = Table(title="The walk", show_header=False)
    for name, value in (
        ("parameters", f"{parameters.total:,} in all, {parameters.active:,} active a token"),
        ("pretraining", f"{summary['pretrain_tokens']:,} tokens, {summary['tokens_per_second']:,.0f} tokens/s"),
        (
            "held-out text",
            f"{figures['val_bits_per_byte']:.3f} bits per byte (perplexity {figures['val_perplexity']:.1f})",
        ),
        ("  by xz -9", f"{figures['xz_bits_per_byte']:.3f} bits per byte"),
        ("  by token frequencies", f"{figures['unigram_bits_per_byte']:.3f} bits per byte"),
        ("held-out questions", f"loss {losses[0]:.3f} before fine-tuning, {losses[-1]:.3f} after"),
        ("time", "  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())),
    ):
        table.add_row(name, value)
    setup.console.print(table)
    program = shlex.join(this_program())
    setup.console.print(
        f"Everything is in {setup.run_dir}: summary.json, tokenizer/, shards/, pretrain/, chat/, finetune/. Try next:\n"
        f"  {program} chat {shlex.quote(str(setup.finetune_dir))}\n"
        f"  {program} sample {shlex.quote(str(setup.pretrain_dir))} --prompt 'import os'\n"
        f"  {program} eval {shlex.quote(str(setup.pretrain_dir))} {shlex.quote(str(PROJECT / 'README.md'))}",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def stage(setup: Setup, name: str) -> Iterator[None]:
    """Print the stage's title, and add its seconds to those of earlier runs, even if it is stopped."""
    setup.console.rule(name)
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = read_seconds(setup)
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 2)
        setup.run_dir.mkdir(parents=True, exist_ok=True)
        (setup.run_dir / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def read_seconds(setup: Setup) -> dict[str, float]:
    file = setup.run_dir / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The figures of every step, without the events between them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "event" not in line]


def median_speed(run_dir: Path) -> float:
    """Tokens per second of the median step."""
    return statistics.median(line["tokens_per_second"] for line in metrics(run_dir) if "tokens_per_second" in line)


def overrides(settings: dict[str, Any]) -> list[str]:
    """`key=value` for every setting; JSON is YAML, whatever a path contains."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def compiled_if_possible(setup: Setup, config: ConfigT) -> ConfigT:
    """The config, without `torch.compile` on a machine that cannot run it."""
    needed = compiling_needs(pick_device(config.parallel.device))
    if needed is None:
        return config
    setup.console.print(f"training without torch.compile, which needs {needed}")
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


def with_steps(config: ConfigT, steps: int) -> ConfigT:
    """The config with at most `steps` steps, and a warm-up that fits them."""
    steps = max(MIN_STEPS, min(steps, config.train.steps))
    schedule = config.train.schedule
    schedule = schedule.model_copy(update={"warmup_steps": min(schedule.warmup_steps, steps // 4)})
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "schedule": schedule})})
