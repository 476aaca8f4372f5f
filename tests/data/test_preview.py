"""What `--preview` prints: the tokens as they are trained on, marked or coloured, and figures of all."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_lm.config.data import ChatDataConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig
from moe_lm.data.batches import IGNORE
from moe_lm.data.examples import ChatExample, read_chat
from moe_lm.data.pairs import read_pairs
from moe_lm.data.preview import masked_text, show_conversations, show_pairs
from moe_lm.data.records import read_dialogues
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.data.rows import assistant, user, write


def rows(path: Path, *pairs: tuple[str, str]) -> str:
    return str(write(path, ({"prompt": asked, "completion": answer} for asked, answer in pairs)))


def cells(lines: list[str]) -> list[list[str]]:
    """The rows of the table."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def printed(tokenizer: Tokenizer, config: ChatDataConfig, count: int, **settings: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, **settings)  # type: ignore[arg-type]
    show_conversations(console, tokenizer, config, read_chat(config, tokenizer), count)
    return file.getvalue()


def test_marks_stand_around_what_is_trained_on(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = rows(tmp_path / "a.jsonl", ("2 [b]+ 2?", "four"), ("", "<|end|>\x1b[31m"), ("q", "not shown"))
    out = printed(tiny_tokenizer, ChatDataConfig(train=[path]), 2)
    tokens = [len(tiny_tokenizer.encode(text)) for text in ("2 [b]+ 2?", "four")]
    assert out.splitlines()[:2] == [
        f"a.jsonl:1: {sum(tokens) + 5} tokens, {tokens[1] + 1} trained on",
        "<|bos|><|user|>2 [b]+ 2?<|end|><|assistant|>⟦four<|end|>⟧",
    ]
    assert "<|bos|><|user|><|end|><|assistant|>⟦<|end|>\\x1b[31m<|end|>⟧\n" in out
    assert "not shown" not in out
    assert "\x1b" not in out


def test_masked_answers_stand_outside_the_marks(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [user("q"), assistant("a", weight=0), user("q"), assistant("a")]},
        {"messages": [user("q"), assistant("a", train=False)]},
    ]
    lines = printed(tiny_tokenizer, ChatDataConfig(train=[write(tmp_path / "a.jsonl", rows)]), 2).splitlines()
    assert lines[:2] == [
        "a.jsonl:1: 13 tokens, 2 trained on",
        "<|bos|><|user|>q<|end|><|assistant|>a<|end|><|user|>q<|end|><|assistant|>⟦a<|end|>⟧",
    ]
    assert lines[-1] == "1 skipped: every assistant message is masked by weight, train or loss (first: a.jsonl:2)"


def test_colours_say_it_where_there_are_some(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    config = ChatDataConfig(train=[rows(tmp_path / "a.jsonl", ("q", "four"))])
    out = printed(tiny_tokenizer, config, 1, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mfour\x1b[0m\x1b[1;36m<|end|>" in out
    assert "\x1b[2mq\x1b[0m\x1b[2;36m<|end|><|assistant|>" in out
    assert "⟦" not in out


@pytest.mark.parametrize("trained", [True, False])
def test_every_token_is_shown_of_which_the_last_is_a_target_alone(tiny_tokenizer: Tokenizer, trained: bool) -> None:
    ids = np.array([0, *tiny_tokenizer.encode("abc"), 6, 4], np.int32)
    targets = ids[1:] if trained else np.full(len(ids) - 1, IGNORE, np.int32)
    text = masked_text(tiny_tokenizer, ChatExample(ids[:-1], targets, 0), marks=True).plain
    assert text == ("<|bos|>⟦abc<|end|><|user|>⟧" if trained else "<|bos|>abc<|end|>")


def test_figures_of_each_source_and_of_what_was_left_out(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    answers = [("q", "a"), ("q", "b" * 400), ("q", " ")]
    one, other = rows(tmp_path / "one.jsonl", *answers), rows(tmp_path / "other.jsonl", ("q", "a"), ("r", "c"))
    held_out = rows(tmp_path / "held_out.jsonl", ("q", "z"))
    config = ChatDataConfig(
        train=[{"path": one, "weight": 3}, {"path": other, "weight": 1}], validation=[held_out], sequence_length=64
    )
    lines = printed(tiny_tokenizer, config, 0).splitlines()
    assert cells(lines) == [
        ["one.jsonl", "1", "6", "2 (33.3%)", "6", "75.0%"],
        ["other.jsonl", "2", "12", "4 (33.3%)", "6", "25.0%"],
        ["all", "3", "18", "6 (33.3%)", "6", ""],
        ["held out", "1", "6", "2 (33.3%)", "6", ""],
    ]
    assert lines[-2:] == [
        "1 skipped: longer than sequence_length=64 (first: one.jsonl:2)",
        "1 skipped: no assistant message with text (first: one.jsonl:3)",
    ]


def test_the_recipe_of_a_mixture_reads_its_sets(shared_data: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "finetune" / "mixed.yaml"
    config = load_config(FinetuneConfig, recipe).data
    report = Report()
    for source in config.train:
        here = source.model_copy(update={"path": str(shared_data / "chat" / Path(source.path or "").name)})
        found = list(islice(read_dialogues([here], report), 20))
        assert len(found) == 20
    assert report.skipped == {}
    assert found[0].content.messages[0]["content"].startswith("译成现代汉语：阴阳天地")
    assert config.weights == [2.0, 2.0, 1.0]


def test_both_answers_of_a_pair_are_shown(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    pairs = [{"prompt": "q", "chosen": "yes", "rejected": "no"}, {"prompt": "r", "chosen": "a", "rejected": "a"}]
    config = ChatDataConfig(train=[write(tmp_path / "a.jsonl", pairs)])
    file = io.StringIO()
    show_pairs(Console(file=file, width=100), tiny_tokenizer, read_pairs(config, tiny_tokenizer), 3)
    lines = file.getvalue().splitlines()
    sides = [len(tiny_tokenizer.encode(text)) for text in ("yes", "no")]
    assert lines[:5] == [
        f"a.jsonl:1, chosen: {sides[0] + 6} tokens, {sides[0] + 1} trained on",
        "<|bos|><|user|>q<|end|><|assistant|>⟦yes<|end|>⟧",
        "",
        f"a.jsonl:1, rejected: {sides[1] + 6} tokens, {sides[1] + 1} trained on",
        "<|bos|><|user|>q<|end|><|assistant|>⟦no<|end|>⟧",
    ]
    counts = [f"{name} {count}" for name, count, *_ in cells(lines)]
    assert counts == ["chosen 1", "rejected 1", "held out, chosen 0", "held out, rejected 0"]
    assert lines[-1] == "1 skipped: a preference pair with equal sides (first: a.jsonl:2)"
