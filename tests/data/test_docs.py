"""The examples of docs/data.md run and give what stands there; every row in it can be trained on."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_lm.config.data import ChatSource, DataConfig, Phase
from moe_lm.data.batches import PackedBatches
from moe_lm.data.formats import dialogue_of, preference_of
from moe_lm.data.order import shuffle_key, shuffled
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.data.rows import write

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("Green is a colour.\n\nLeaves are green.\n")
    write(Path("notes/b.jsonl"), [{"text": "The sky is blue."}, {"title": "no text"}, {"text": "Snow is white."}])
    sources = [{"name": "notes", "path": "notes"}]
    report = prepare(
        DataConfig(sources=sources, tokenizer=ROOT / "tokenizer" / "tiny", shards="shards", validation_fraction=0.3)
    )
    assert str(report) in DOCUMENT
    names = {"np": np, "tokenizer": tiny_tokenizer, "shards": TokenShards.open(Path("shards/notes"), "train")}
    names |= {"PackedBatches": PackedBatches, "Phase": Phase, "shuffled": shuffled, "shuffle_key": shuffle_key}
    # A fence ends the output of an example, as an empty line would.
    examples = doctest.DocTestParser().get_doctest(re.sub("```.*", "", DOCUMENT), names, "data.md", None, None)
    assert doctest.DocTestRunner().run(examples, clear_globs=False) == doctest.TestResults(0, 12)
    found = examples.globs
    authors = "".join(str(author) if author < 2 else "." for author in found["authors"])
    trained = "".join(" ^"[int(is_trained)] for is_trained in found["trained"]).rstrip()
    assert "\n".join([found["text"], authors, trained]) in DOCUMENT


def test_every_row_can_be_trained_on() -> None:
    rows = [
        json.loads(row) for block in re.findall(r"```jsonl\n(.*?)```", DOCUMENT, re.S) for row in block.splitlines()
    ]
    rows += [json.loads(row) for row in re.findall(r"^\| `\w+` \| `(\{.*\})` \|$", DOCUMENT, re.M)]
    source = ChatSource(path="rows.jsonl")
    pairs = [preference_of(row, source) for row in rows if "chosen" in row]
    assert len([dialogue_of(row, source) for row in rows if "chosen" not in row]) == 6
    assert pairs == [pairs[0]] * 3
