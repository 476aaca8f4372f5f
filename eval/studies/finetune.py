"""What fine-tuning does to a small base model: instructions, preferences, classical into modern Chinese.

    pip install ".[eval]"
    python eval/studies/finetune.py --out eval/results/finetune

Splits ../shared/data/chat once for all tasks (what is held out of preferences was not trained on as instructions
either, and no held-out modern sentence is in the base's text), trains a tokenizer and a base model of 12M parameters,
and fine-tunes it with the recipes of `eval/studies/finetune/`, each a process of its own, so that its peak memory is
its own. Writes OUT.json and OUT.png. Stopped and started again it goes on; a run that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml
from sacrebleu.metrics import CHRF

from moe_lm.checkpoint import checkpoint
from moe_lm.config.generation import SampleConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.config.training import PreferenceConfig
from moe_lm.data.pairs import PairRows, read_pairs
from moe_lm.generate.beams import search
from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.objective.preference import answer_log_probs
from moe_lm.objective.training_loss import NextToken, TrainingLoss
from moe_lm.parallel.topology import current_topology
from moe_lm.text.split import held_out
from moe_lm.train import cost, finetune

RECIPES = Path(__file__).with_suffix("")
WORK = Path("runs/finetune-study")
NEW_TOKENS = 96
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results without a suffix")
    parser.add_argument("--pairs", type=int, default=200, help="held-out sentences to translate")
    parser.add_argument("--note", action="append", default=[], help="what to say beside the results")
    arguments = parser.parse_args()
    data = Path("../shared/data")
    if not (WORK / "chat").exists():
        split(data)
    verb("tokenizer", "tokenizer", "train", RECIPES / "tokenizer.yaml")
    verb("shards", "prepare", RECIPES / "base.yaml")
    verb("base", "pretrain", RECIPES / "base.yaml")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, torch {torch.__version__}",
        "notes": arguments.note,
        "base": {**training("base"), "seconds": seconds("base")},
        "instructions": {
            name: tuned(f"instructions-{name}", "instructions", name)
            for name in ("all", "lora", "all-by-rows", "lora-by-rows")
        },
        "preferences": preferences(),
        "translation": translation(arguments.pairs),
    }
    arguments.out.with_suffix(".json").write_text(
        json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    plot(result, arguments.out.with_suffix(".png"))


# ---- the data


def split(data: Path) -> None:
    """Held out by a hash of the question, the same for instructions and preferences.

    The modern side of a held-out sentence stands neither in the text of the base nor in another sentence's training.
    """
    with lzma.open(data / "chat/preferences.json.xz", "rt", encoding="utf-8") as file:
        preferences = json.load(file)
    write("instructions", preferences, lambda row: row["instruction"] + row["input"], 0.1, "rejected", "chosen")
    write("preferences", preferences, lambda row: row["instruction"] + row["input"], 0.1, "output")
    with lzma.open(data / "chat/classical-to-modern-zh.jsonl.xz", "rt", encoding="utf-8") as file:
        sentences = {row["modern"]: row for row in map(json.loads, file)}
    hidden = write("translation", list(sentences.values()), lambda row: row["classical"], 0.02)
    modern = {row["modern"] for row in hidden}
    path = WORK / "text/prose-zh.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(data / "text/prose-zh.jsonl.xz", "rt", encoding="utf-8") as file, path.open("w") as out:
        for line in file:
            lines = json.loads(line)["text"].split("\n")
            text = "\n".join(line for line in lines if not any(sentence in line for sentence in modern))
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write(
    name: str, rows: Sequence[Row], question: Callable[[Row], str], fraction: float, *without: str
) -> Sequence[Row]:
    """The two sides as JSONL, without some of the fields and without rows that come twice; returns the held-out one."""
    rows = [{key: value for key, value in row.items() if key not in without} for row in rows]
    rows = list({question(row): row for row in rows}.values())
    hidden = [row for row in rows if held_out(question(row), fraction)]
    for side, of_side in (("train", [row for row in rows if row not in hidden]), ("validation", hidden)):
        path = WORK / f"chat/{name}-{side}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in of_side)
        path.write_text("".join(lines), encoding="utf-8")
    return hidden


# ---- the runs


def verb(name: str, *words: str | Path) -> None:
    """Run a verb of the product, once: a second start of the study finds the seconds that it took."""
    if seconds(name) is not None:
        return
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "moe_lm", *map(str, words)], check=True)
    (WORK / f"{name}.seconds").write_text(f"{time.monotonic() - started:.1f}", encoding="utf-8")


def seconds(name: str) -> float | None:
    file = WORK / f"{name}.seconds"
    return float(file.read_text(encoding="utf-8")) if file.exists() else None


def settings(name: str, recipe: str, variant: str) -> tuple[Path, list[str], FinetuneConfig]:
    """A recipe, what differs in a variant (as on the command line), and both together."""
    path = RECIPES / f"{recipe}.yaml"
    variants = yaml.safe_load((RECIPES / "variants.yaml").read_text(encoding="utf-8"))
    overrides = [f"run_dir={WORK / name}", *variants.get(variant, [])]
    return path, overrides, load_config(FinetuneConfig, path, overrides)


def tuned(name: str, recipe: str, variant: str) -> dict[str, Any]:
    """Fine-tune, and what came of it; memory in MiB."""
    path, overrides, config = settings(name, recipe, variant)
    verb(name, "finetune", path, *overrides)
    model = finetune.model_of(config, checkpoint.resolve(config.start_from))
    found = cost.cost(config, model, config.lora, current_topology())
    return {
        "settings": overrides[1:],
        "trained": found.trained,
        "trained_share": found.trained / found.parameters,
        "computed_state_mib": found.memory.total / 2**20,
        "seconds": seconds(name),
        **training(name),
    }


def training(name: str) -> dict[str, Any]:
    """Held-out figures by step, speed, and the peak of the process's memory."""
    lines = (WORK / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "event" not in record]
    steps = [record for record in records if "loss" in record]
    held = [{key: record[key] for key in record if key == "step" or key.startswith("val_")} for record in records]
    return {
        "steps": steps[-1]["step"],
        "tokens": sum(record["tokens"] for record in steps),
        "step_seconds": sum(record["seconds"] for record in steps),
        "peak_process_mib": max(record["memory_bytes"] for record in steps) / 2**20,
        "held_out": [record for record in held if len(record) > 1],
    }


# ---- the tasks


def preferences() -> dict[str, Any]:
    """DPO on the model that learnt the instructions."""
    result = tuned("preferences", "preferences", "dpo")
    _, _, config = settings("preferences", "preferences", "dpo")
    for when, run in (("before", WORK / "instructions-all"), ("after", WORK / "preferences")):
        result[when] = raw_preference(run, config)
    return result


@torch.no_grad()
def raw_preference(run: Path, config: FinetuneConfig) -> dict[str, float]:
    """Of the held-out pairs, by the model alone and with no reference: nats a side, and how often the chosen one leads.

    The margins of training are against the reference, so before the first step they are 0 whatever the model prefers.
    """
    assert isinstance(config.preference, PreferenceConfig)
    session = Session.load(run, device="cpu")
    pairs = read_pairs(config.data, session.tokenizer).validation
    rows = PairRows(pairs, config.data.sequence_length, session.tokenizer.pad_id)
    loss = TrainingLoss(session.model, NextToken(), config.train.balance, session.tokenizer.pad_id)
    batches = [batch for _, batch in rows.in_order(4)]
    answers = [answer_log_probs(loss.predict(batch)[0].nll(batch.targets), batch) for batch in batches]
    log_probs, lengths = (torch.cat(part).double() for part in zip(*answers, strict=True))
    chosen, rejected = log_probs.unbind(-1)
    shorter = lengths.argmin(-1)
    return {
        "pairs": len(log_probs),
        "chosen_leads": (chosen > rejected).double().mean().item(),
        "shorter_leads": (log_probs.argmax(-1) == shorter).double().mean().item(),
        "median_nats_between_the_sides": (chosen - rejected).abs().median().item(),
        "log_prob_chosen": chosen.mean().item(),
        "log_prob_rejected": rejected.mean().item(),
    }


def translation(count: int) -> dict[str, Any]:
    """Classical into modern Chinese, with and without scheduled sampling."""
    lines = (WORK / "chat/translation-validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:count]
    references = [row["modern"] for row in rows]
    copied = chrf([row["classical"] for row in rows], references)
    result: dict[str, Any] = {"decoded": len(rows), "chrf_of_the_source_itself": copied}
    result["base"] = {"greedy": decoded(WORK / "base", rows, greedily)}
    for variant in ("plain", "scheduled"):
        name = f"translation-{variant}"
        result[variant] = tuned(name, "translation", variant)
        result[variant]["greedy"] = decoded(WORK / name, rows, greedily)
    result["plain"]["beams_4"] = decoded(WORK / "translation-plain", rows, widely)
    return result


def greedily(session: Session, prompts: Sequence[list[int]]) -> list[list[int]]:
    tokenizer = session.tokenizer
    return generate(session.model, prompts, Settings(NEW_TOKENS), tokenizer.stop_ids, tokenizer.vocab_size)


def widely(session: Session, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The best of four beams, with no penalty for length but its own."""
    tokenizer, how = session.tokenizer, SampleConfig(beams=4, max_new_tokens=NEW_TOKENS)
    found = [search(session.model, prompt, how, tokenizer.stop_ids, tokenizer.vocab_size) for prompt in prompts]
    return [beams[0].ids for beams in found]


def decoded(
    run: Path, rows: Sequence[Row], decode: Callable[[Session, Sequence[list[int]]], list[list[int]]]
) -> dict[str, float]:
    """chrF of what a model writes, and how long that is beside the references."""
    _, _, config = settings("translation", "translation", "plain")
    template = config.data.train[0].prompt_template
    assert template is not None
    session = Session.load(run, device="cpu")
    tokenizer, texts = session.tokenizer, []
    for start in range(0, len(rows), 50):
        asked = [[{"role": "user", "content": template.format_map(row)}] for row in rows[start : start + 50]]
        prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True)[0] for messages in asked]
        texts += [tokenizer.decode(ids) for ids in decode(session, prompts)]
    return {
        "chrf": chrf(texts, [row["modern"] for row in rows]),
        "length_ratio": sum(map(len, texts)) / sum(len(row["modern"]) for row in rows),
    }


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Character F-score (chrF2, sacrebleu's defaults), 0 to 100, over all sentences."""
    return float(CHRF().corpus_score(list(texts), [list(references)]).score)


def plot(result: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, label in (("all", "all weights"), ("lora", "LoRA")):
        held = result["instructions"][name]["held_out"]
        left.plot([at["step"] for at in held], [at["val_loss"] for at in held], marker=".", label=label)
    left.set(xlabel="step", ylabel="nats a target token", title="Instructions, held out")
    for name, label in (("plain", "teacher forcing"), ("scheduled", "scheduled sampling")):
        held = result["translation"][name]["held_out"]
        right.plot([at["step"] for at in held], [at["val_loss"] for at in held], marker=".", label=label)
    right.set(xlabel="step", title="Classical into modern Chinese, held out")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
