"""What a quickstart shows at its end: bits per byte, samples, a table, and what to type next."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_lm.common.process import to_type
from moe_lm.config.run import PretrainConfig
from moe_lm.data.shards import TokenShards
from moe_lm.evaluate.perplexity import evaluate, unigram_bits_per_byte, xz_bits_per_byte
from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.generate.text import Delta
from moe_lm.kernels.device import pick_device
from moe_lm.model.size import count_parameters
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.quickstart.setup import CORPUS, PROJECT, SUMMARY, Setup, read_seconds

CONTINUE = Settings(max_new_tokens=80, sampling=Sampling(temperature=0.7, top_p=0.9), seed=1)
ANSWER = Settings(max_new_tokens=60, sampling=GREEDY)
PROMPTS = ("def read_file(path):\n", "class Stack:\n")  # that a model of the standard library continues
OWN_PROMPTS, PROMPT_CHARACTERS = 2, 40  # from the held-out text, in place of them
QUESTIONS = 4  # held out, which the fine-tuned model answers
CONTINUED, ANSWERED = 2 * CONTINUE.max_new_tokens, QUESTIONS * ANSWER.max_new_tokens  # tokens that are sampled


def measure(setup: Setup, config: PretrainConfig) -> dict[str, Any]:
    """Bits per byte of the held-out documents: by the model, by xz, by token frequencies.

    In a short walk every window scores all of its tokens, which takes half the time.
    """
    evaluation = evaluate(setup.pretrain_dir, stride=config.row_length if setup.is_short else None)
    tokenizer = Tokenizer.load(setup.tokenizer)
    train, validation = (TokenShards.open(config.data.shards / CORPUS, split) for split in ("train", "validation"))
    counts = np.bincount(train.tokens(0, train.num_tokens), minlength=tokenizer.vocab_size)
    counts[tokenizer.bos_id] = 0
    predicted = validation.tokens(0, validation.num_tokens)
    text = tokenizer.decode(predicted.tolist()).encode()
    assert validation.text_bytes is not None
    predicted = predicted[predicted != tokenizer.bos_id]
    return {
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_perplexity": evaluation.perplexity,
        "val_bytes": evaluation.text_bytes,
        "val_documents": evaluation.documents,
        "xz_bits_per_byte": xz_bits_per_byte(text),
        "unigram_bits_per_byte": unigram_bits_per_byte(counts, predicted, validation.text_bytes),
    }


def show_samples(setup: Setup, config: PretrainConfig) -> list[dict[str, str]]:
    """Print the pretrained model's continuations and the fine-tuned model's answers as they are generated."""
    samples = []
    session = Session.load(setup.pretrain_dir, device=config.parallel.device)
    for prompt in PROMPTS if setup.corpus is None else own_prompts(setup, config):
        text = show(setup, prompt, session.complete(prompt, CONTINUE))
        samples.append({"model": "pretrain", "prompt": prompt, "text": text})
    if setup.corpus is None:
        session = Session.load(setup.finetune_dir, device=config.parallel.device)
        rows = [json.loads(line)["messages"] for line in setup.chat_file("validation").read_text("utf-8").splitlines()]
        for question, reference in rows[:: max(1, len(rows) // QUESTIONS)][:QUESTIONS]:
            text = show(setup, question["content"] + "\n", session.chat([question], ANSWER))
            shown = {"prompt": question["content"], "text": text, "reference": reference["content"]}
            samples.append({"model": "finetune"} | shown)
    return samples


def own_prompts(setup: Setup, config: PretrainConfig) -> list[str]:
    """Beginnings of lines of the held-out text, evenly spread over it."""
    shards = TokenShards.open(config.data.shards / CORPUS, "validation")
    tokenizer = Tokenizer.load(setup.tokenizer)
    step = max(1, (shards.num_documents or 0) // OWN_PROMPTS)
    chosen = islice(shards.documents(), 0, step * OWN_PROMPTS, step)
    texts = (tokenizer.decode(document[:200].tolist()) for document in chosen)
    return [prompt for text in texts if (prompt := beginning(text))]


def beginning(text: str) -> str:
    """The first words of the first line that is long enough, up to PROMPT_CHARACTERS; empty if none is."""
    for line in text.splitlines():
        words = line.strip()
        if len(words) >= PROMPT_CHARACTERS // 2:
            cut = words[:PROMPT_CHARACTERS]
            return cut.rpartition(" ")[0] or cut if len(words) > PROMPT_CHARACTERS else cut
    return ""


def show(setup: Setup, prompt: str, deltas: Iterable[Delta]) -> str:
    """Stream a text to the terminal, after its prompt."""
    setup.console.print(prompt, style="bold", end="", markup=False, highlight=False)
    text = ""
    for delta in deltas:
        setup.console.out(delta.text, end="", highlight=False)
        text += delta.text
    setup.console.print("\n")
    return text


def summarise(setup: Setup, config: PretrainConfig, figures: dict[str, Any]) -> None:
    """Write summary.json, and print the table and the commands to try next."""
    parameters = count_parameters(config.model)
    train = TokenShards.open(config.data.shards / CORPUS, "train")
    trained = sum(line["tokens"] for line in metrics(setup.pretrain_dir))
    seconds = read_seconds(setup.run_dir)
    summary = {
        "seconds": seconds,
        "tokens_per_second": median_speed(setup.pretrain_dir),
        "pretrain_tokens": trained,
        "epochs": trained / train.num_tokens,
        **figures,
        "params_total": parameters.total,
        "params_active": parameters.active,
        "device": pick_device(config.parallel.device).type,
    }
    (setup.run_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    table = Table(title="The walk", show_header=False)
    for row in table_rows(summary):
        table.add_row(*row)
    shown = Console(file=StringIO(), width=setup.console.width, record=True)
    for console in (setup.console, shown):
        console.print(table)
        console.print("\n".join(next_steps(setup, summary)), highlight=False, soft_wrap=True)
    (setup.run_dir / SUMMARY).write_text(shown.export_text(), encoding="utf-8")


def table_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{summary['params_total']:,} in all, {summary['params_active']:,} active a token"
    speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
    yield "pretraining", f"{summary['pretrain_tokens']:,} tokens, the text {summary['epochs']:.1f} times, {speed}"
    bits = f"{summary['val_bits_per_byte']:.3f} bits per byte (perplexity {summary['val_perplexity']:.1f})"
    yield "held-out text", bits
    yield "  by xz -9", f"{summary['xz_bits_per_byte']:.3f} bits per byte"
    yield "  by token frequencies", f"{summary['unigram_bits_per_byte']:.3f} bits per byte"
    if "sft_val_loss_before" in summary:
        before, after = summary["sft_val_loss_before"], summary["sft_val_loss_after"]
        yield "held-out questions", f"loss {before:.3f} before fine-tuning, {after:.3f} after"
    yield "time", "  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items())


def next_steps(setup: Setup, summary: dict[str, Any]) -> Iterator[str]:
    """Where everything is, and commands that are worth typing now."""
    run = setup.pretrain_dir
    if summary["val_bits_per_byte"] > summary["unigram_bits_per_byte"]:
        minutes = "1 minute was" if setup.minutes == 1 else f"{setup.minutes:g} minutes were"
        yield f"The model is still worse than token frequencies: {minutes} too few; give it more, as below."
    more = ["quickstart", "--minutes", f"{2 * setup.minutes:g}", "--run-dir", setup.run_dir]
    if setup.corpus is None:
        folders = "tokenizer/, shards/, pretrain/, chat/, finetune/"
        yield f"Everything is in {setup.run_dir}: summary.json, {folders}. Try next:"
        yield f"  {to_type('chat', setup.finetune_dir)}"
        yield f"  {to_type('sample', run, '--prompt', 'import os')}"
        yield f"  {to_type('eval', run, PROJECT / 'README.md')}"
    else:
        more += ["--corpus", setup.corpus]
        prompt = next((sample["prompt"] for sample in summary["samples"]), "Once")
        yield f"Everything is in {setup.run_dir}: summary.json, tokenizer/, shards/, pretrain/. Try next:"
        yield f"  {to_type('sample', run, '--prompt', prompt)}"
        yield f"  {to_type('explain', run, '--prompt', prompt)}"
    yield f"  {to_type(*more)}    # trains on from here"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The figures of every step, without the events between them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "event" not in line]


def median_speed(run_dir: Path) -> float:
    """Tokens per second of the median step."""
    return statistics.median(line["tokens_per_second"] for line in metrics(run_dir) if "tokens_per_second" in line)
