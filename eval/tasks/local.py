"""The data of the tasks in this folder: files of --task-data, as their authors publish them, compressed or not."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from moe_lm.common.errors import UsageError

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
BRACKETS = re.compile(r"\[.*?\]")  # of WikiHow, in HellaSwag


def blimp(**_: Any) -> datasets.DatasetDict:
    files = _find("blimp*.jsonl", "BLiMP's data/*.jsonl (github.com/alexwarstadt/blimp), joined into blimp.jsonl,")
    return _examples([{name: row[name] for name in ("sentence_good", "sentence_bad", "UID")} for row in _rows(files)])


def lambada(**_: Any) -> datasets.DatasetDict:
    files = _find("lambada*.jsonl", "OpenAI's lambada_test.jsonl (huggingface.co/datasets/EleutherAI/lambada_openai)")
    return _examples([{"text": row["text"]} for row in _rows(files)])


def piqa(**_: Any) -> datasets.DatasetDict:
    source = "PIQA's valid.jsonl as piqa-valid.jsonl, and valid-labels.lst (yonatanbisk.com/piqa)"
    rows = _rows(_find("piqa-valid.jsonl", source))
    labels = "".join(_lines(_find("valid-labels.lst", source))).split()
    if len(rows) != len(labels):
        raise UsageError(f"piqa-valid.jsonl has {len(rows)} lines, valid-labels.lst {len(labels)}; download both again")
    pairs = zip(rows, labels, strict=True)
    return _examples([{**row, "label": int(label)} for row, label in pairs])


def hellaswag(**_: Any) -> datasets.DatasetDict:
    files = _find("hellaswag*.jsonl", "HellaSwag's hellaswag_val.jsonl (github.com/rowanz/hellaswag)")
    found = []
    for row in _rows(files):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices = [_plain(ending) for ending in row["endings"]]
        found.append({"query": _plain(context), "choices": choices, "gold": int(row["label"])})
    return _examples(found)


def arc(name: str, **_: Any) -> datasets.DatasetDict:
    files = _find(f"{name}-Test.jsonl", f"{name}-Test.jsonl of ARC-V1-Feb2018 (allenai.org/data/arc)")
    found = []
    for row in _rows(files):
        choices = row["question"]["choices"]
        labels = [choice["label"] for choice in choices]
        texts = [choice["text"] for choice in choices]
        found.append({"question": row["question"]["stem"], "choices": texts, "gold": labels.index(row["answerKey"])})
    return _examples(found)


def _find(pattern: str, source: str) -> list[Path]:
    """The files of a name in the folder of --task-data. Raises UsageError, with their source, if there is none."""
    folder = Path(os.environ.get("MOE_LM_TASK_DATA", "data/tasks"))
    found = sorted(file for suffix in OPENERS for file in folder.glob(pattern + suffix))
    if not found:
        raise UsageError(f"there is no {pattern} in {folder}; put {source} there, or name its folder with --task-data")
    return found


def _lines(files: list[Path]) -> list[str]:
    lines: list[str] = []
    for path in files:
        with OPENERS[path.suffix if path.suffix in OPENERS else ""](path, "rt", encoding="utf-8") as file:
            lines += file
    return lines


def _rows(files: list[Path]) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _lines(files) if line.strip()]
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"{', '.join(map(str, files))} cannot be read: {error}; download it again") from error


def _examples(rows: list[dict[str, Any]]) -> datasets.DatasetDict:
    return datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})


def _plain(text: str) -> str:
    """As lm-eval prepares HellaSwag: a title begins a new sentence, other marks in brackets go."""
    return BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
