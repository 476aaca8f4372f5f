"""Does a model that was trained on short rows read long texts once YaRN stretches its positions?

    python -m eval.studies.longer_contexts stories.jsonl.xz --out eval/results/longer_contexts.json

The file has a book in each row. A small model trains on rows of 256 tokens. Then two runs go on from it, for as many
steps of as many tokens: one on the same rows (the control), one on rows of 2,048 with YaRN of factor 8. On books that
none of them read, the loss by the length of the context is measured at 2,048 tokens, of the first model also with YaRN
alone; and how often each finds a fact (`moe-lm eval --needle`).

Books do not teach a model this small to find facts. A share of the text of all runs (`--facts`) is therefore synthetic:
sentences of books in which the needle's own sentence, about one place and with one answer, comes again and again. The
gaps between two of them are up to 100 characters in some documents, and up to 6,000 in others.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.config.model import RopeScaling
from moe_lm.config.run import PretrainConfig
from moe_lm.data.prepare import prepare
from moe_lm.evaluate.needle import ANSWERS, FACT, PLACES, Haystacks, filler_of, grid
from moe_lm.evaluate.perplexity import context_scores, precision_of, score_by_context
from moe_lm.evaluate.texts import file_texts
from moe_lm.generate.session import Session
from moe_lm.model.rotary import Rotary
from moe_lm.model.size import count_parameters
from moe_lm.train import pretrain
from moe_lm.train.start import completed

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"
SHORT, LONG = 256, 2048
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": float(LONG // SHORT), "original_max_position_embeddings": SHORT}
MODEL = {
    "vocab_size": 1024, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 256,
    "moe_intermediate_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "max_position_embeddings": SHORT,
}  # fmt: skip
ROWS = 8  # of SHORT tokens, in a step
EVERY = 40  # of so many books one is held out
BOOK = 75_000  # characters of a held-out book
BYTES = 2_500_000  # of books to train on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="JSON rows with the text of a book each, compressed with xz")
    parser.add_argument("--steps", type=int, default=250, help="of the first run")
    parser.add_argument("--more-steps", type=int, default=50, help="of the two that go on from it")
    parser.add_argument("--facts", type=float, default=0.3, help="share of synthetic text")
    parser.add_argument("--trials", type=int, default=4, help="texts for each length and depth of the needle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.process_time()
    with TemporaryDirectory() as scratch:
        result = study(arguments, Path(scratch))
    result |= {"cpu_seconds": round(time.process_time() - begun)}
    print(json.dumps(result["models"], indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def study(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train the three models, and measure them."""
    held_out = write_texts(arguments.books, scratch)
    short = configured(arguments, scratch / "short", arguments.steps)
    prepare(short.data)
    pretrain.run(short)
    longer = configured(arguments, scratch / "longer", arguments.more_steps, short.run_dir, LONG)
    pretrain.run(longer)
    control = configured(arguments, scratch / "control", arguments.more_steps, short.run_dir)
    pretrain.run(control)
    models = {
        "trained at 256": figures(short.run_dir, held_out, arguments),
        "the same with YaRN": figures(short.run_dir, held_out, arguments, stretched=True),
        "trained on at 2,048 with YaRN": figures(longer.run_dir, held_out, arguments),
        "trained on at 256": figures(control.run_dir, held_out, arguments),
        "trained on at 256, with YaRN": figures(control.run_dir, held_out, arguments, stretched=True),
    }
    settings = {name: getattr(arguments, name) for name in ("steps", "more_steps", "facts", "trials", "seed")}
    about = {"date": date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    parameters = count_parameters(short.model)
    size = {"parameters": parameters.total, "active": parameters.active, "tokens_of_a_step": ROWS * SHORT}
    return about | settings | size | {"models": models}


def write_texts(books: Path, scratch: Path) -> Path:
    """The text to train on, as two sources; the file of the books that are held out."""
    with lzma.open(books, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    kept = texts[EVERY - 1 :: EVERY]
    del texts[EVERY - 1 :: EVERY]
    random.Random(0).shuffle(texts)
    sizes = [sum(map(len, texts[:count])) for count in range(len(texts))]
    read = [text for text, before in zip(texts, sizes, strict=True) if before < BYTES]
    write_rows(scratch / "books.jsonl", read)
    write_rows(scratch / "facts.jsonl", list(with_facts(read, documents=100)))
    return write_rows(scratch / "held-out.jsonl", [text[:BOOK] for text in kept])


def write_rows(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def with_facts(texts: list[str], documents: int) -> Iterator[str]:
    """Documents in which one fact comes again and again between pieces of the texts."""
    draw = random.Random(1)
    for _ in range(documents):
        text = draw.choice(texts)
        place, answer = draw.choice(PLACES), draw.choice(ANSWERS)
        fact = FACT.format(place=place, answer=answer)
        begin, longest = draw.randrange(max(1, len(text) - 12_000)), 100 * 60 ** draw.random()
        pieces, size = [], 0
        while size < 12_000:
            gap = round(longest * draw.random())
            pieces += [fact, text[begin + size : begin + size + gap]]
            size += gap + len(fact)
        yield "".join(pieces)


def configured(
    arguments: argparse.Namespace, run_dir: Path, steps: int, start: Path | None = None, length: int = SHORT
) -> PretrainConfig:
    """The first run, or one that goes on from a start: as many tokens a step, in rows of `length`."""
    goes_on = start is not None
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "start_from": None if start is None else str(start),
        "model": MODEL if start is None else {},
        "data": {
            "tokenizer": str(TOKENIZER),
            "shards": str(run_dir.parent / "shards"),
            "sources": [
                {"name": "books", "path": str(run_dir.parent / "books.jsonl"), "weight": 1 - arguments.facts},
                {"name": "facts", "path": str(run_dir.parent / "facts.jsonl"), "weight": arguments.facts},
            ],
            "validation_fraction": 0.0,
            "workers": 1,
            "sequence_length": length,
        },
        "train": {
            "steps": steps,
            "seed": arguments.seed + 100 * goes_on,
            "global_batch_size": ROWS * SHORT // length,
            "optimizer": {
                "name": "muon", "lr": 6e-3 if goes_on else 1.2e-2, "muon_lr": 0.01 if goes_on else 0.02,
                "weight_decay": 0.01,
            },
            "schedule": {"name": "wsd", "warmup_steps": 20, "decay_fraction": 0.5, "min_ratio": 0.02},
            "balance": {"bias_update_rate": 0.01},
        },
        "checkpoint": {"every": 0},
        "log": {"every": 50},
    }  # fmt: skip
    if length > SHORT:
        values["model"] = {"rope_parameters": YARN, "max_position_embeddings": length}
    return PretrainConfig.model_validate(completed(values) if goes_on else values)


def figures(run_dir: Path, held_out: Path, arguments: argparse.Namespace, stretched: bool = False) -> dict[str, Any]:
    """Loss by the length of the context, and the needle's grid; `stretched`: with YaRN, which it was not trained on."""
    session = Session.load(run_dir, decoding=False)
    model, dtype = session.model, precision_of(session)
    if stretched:
        model.model.rotary = Rotary(model.config.model_copy(update={"rope_scaling": RopeScaling(**YARN)}))
    [text] = file_texts([held_out], session.tokenizer)
    nll, tokens = score_by_context(model, text.documents, LONG, LONG, 1, dtype)
    haystacks = Haystacks(session.tokenizer, filler_of(text.documents, 100_000))
    lengths = [SHORT // 2, SHORT, 4 * SHORT, LONG]
    found = grid(model, haystacks, lengths, 3, arguments.trials, dtype)
    print(run_dir.name, "with YaRN" * stretched, *context_scores(nll, tokens), found, sep="\n", flush=True)
    return {
        "loss": round(float(nll.sum() / tokens.sum()), 4),
        "by_context": {
            f"{score.context.start} to {score.context.stop - 1}": {
                "tokens": score.tokens, "nll": round(score.nll, 4),
                "perplexity": round(float(torch.tensor(score.nll).exp()), 2),
            }
            for score in context_scores(nll, tokens)
        },
        "needle": {
            str(length): {
                f"{cell.depth:g}": {"found": round(cell.found, 3), "nll": round(cell.nll, 3)}
                for cell in found.cells if cell.length == length
            }
            for length in lengths
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
