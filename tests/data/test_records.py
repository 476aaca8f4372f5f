"""Where conversations and pairs come from: files, patterns and data sets; what is counted; the real sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import ChatSource
from moe_lm.data.records import read_dialogues, read_preferences
from moe_lm.text.files import Report
from tests.data.rows import assistant, said, user, write

ROWS = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(3)]


def write_source(path: Path, rows: list[Any]) -> ChatSource:
    return ChatSource(path=str(write(path, rows)))


def answers(*sources: ChatSource) -> tuple[list[str], Report]:
    report = Report()
    return [row.content.messages[-1]["content"] for row in read_dialogues(sources, report)], report


def test_parquet_and_json_lines_are_read_alike(tmp_path: Path) -> None:
    rows = [said("q", "a")] * 300
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = write_source(tmp_path / "a.jsonl", rows)
    parquet = ChatSource(path=str(tmp_path / "a.parquet"))
    (one, _), (other, _) = answers(lines), answers(parquet)
    assert one == other == ["a"] * 300
    found = list(read_dialogues([lines, parquet], Report()))
    assert {row.hash for row in found} == {found[0].hash}
    assert [(row.where, row.source) for row in found][299:301] == [("a.jsonl:300", 0), ("a.parquet:1", 1)]


def test_a_broken_parquet_file_and_row_are_counted(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    texts = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary())
    raw = pyarrow.StringArray.from_buffers(2, texts.buffers()[1], texts.buffers()[2])
    table = pyarrow.table({"prompt": pyarrow.array(["q", "q"]), "completion": raw})
    pyarrow.parquet.write_table(table, tmp_path / "row.parquet")
    found, report = answers(*(ChatSource(path=str(tmp_path / name)) for name in ("broken.parquet", "row.parquet")))
    assert found == ["ok"]
    assert report.skipped == {"unreadable file": 1, "invalid UTF-8": 1}
    assert report.examples["invalid UTF-8"] == "row.parquet:2"


def test_a_pattern_reads_its_files_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write(tmp_path / f"{number}.jsonl", [ROWS[number]])
    assert answers(ChatSource(path=str(tmp_path / "*.jsonl")))[0] == ["a0", "a1", "a2"]


def test_a_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    report = Report()
    found = list(read_dialogues([ChatSource(dataset=str(tmp_path))], report))
    assert [row.content.messages[0]["content"] for row in found] == ["q0", "q1", "q2"]
    assert found[1].where == f"{tmp_path}:2"
    with pytest.raises(MoeLmError, match=r"data set .*nowhere .* cannot be read"):
        answers(ChatSource(dataset=str(tmp_path / "nowhere")))


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path / "*.jsonl", tmp_path):
        with pytest.raises(UsageError, match=r"conversations .* do not exist; expected a \.json, \.jsonl or \.parquet"):
            answers(ChatSource(path=str(path)))


def test_broken_rows_are_counted_with_file_row_and_reason(tmp_path: Path) -> None:
    deep = '{"messages": ' + "[" * 100_000 + "\n"
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n{broken\n[]\n" + deep + json.dumps(ROWS[1]) + "\n{}\n")
    found, report = answers(ChatSource(path=str(tmp_path / "a.jsonl")))
    assert found == ["a0", "a1"]
    assert [line.split("skipped: ")[1] for line in report.skipped_lines()] == [
        "broken JSON (first: a.jsonl:2)",
        "row is not an object (first: a.jsonl:3)",
        "no messages, conversations, instruction with output, or prompt with completion (first: a.jsonl:6)",
    ]
    assert report.skipped["broken JSON"] == 2


def test_tool_calls_count_in_the_hash(tmp_path: Path) -> None:
    calls = [[{"name": name, "arguments": {}}] for name in ("f", "g")]
    rows = [{"messages": [user("q"), assistant(None, tool_calls=call)]} for call in calls]
    one, other = read_dialogues([write_source(tmp_path / "a.jsonl", rows)], Report())
    assert one.hash != other.hash


def test_masks_do_not_change_the_split_of_messages(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("q"), assistant("a", **mark), *said("q", "a")["messages"]]} for mark in ({}, {"weight": 0})
    ]
    plain, masked = read_dialogues([write_source(tmp_path / "a.jsonl", rows)], Report())
    assert plain.content != masked.content
    assert plain.hash == masked.hash


def test_masks_in_parquet_are_read_beside_null_fields(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("q"), assistant("a", weight=0), *said("q", "a")["messages"]]},
        {"messages": [user("q"), assistant("a", weight=0.5)]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = Report()
    [found] = read_dialogues([ChatSource(path=str(tmp_path / "a.parquet"))], report)
    assert found.content.messages == [user("q"), assistant("a", train=False), user("q"), assistant("a")]
    assert report.skipped_lines() == ["1 skipped: a message whose weight is neither 0 nor 1 (first: a.parquet:2)"]


# The real sets


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("instructions.json.xz", {}, 1100),
        ("gsm8k-train.jsonl.xz", {"fields": {"prompt": "question", "completion": "answer"}}, 7473),
        (
            "classical-to-modern-zh.jsonl.xz",
            {
                "format": "prompt_completion",
                "fields": {"prompt": "classical", "completion": "modern"},
                "prompt_template": "译成现代汉语：{prompt}",
            },
            20000,
        ),
    ],
)
def test_every_row_of_a_real_set_is_a_conversation(
    shared_data: Path, name: str, settings: dict[str, Any], rows: int
) -> None:
    report = Report()
    found = list(read_dialogues([ChatSource(path=str(shared_data / "chat" / name), **settings)], report))
    assert len(found) + sum(report.skipped.values()) == rows
    assert report.skipped == {}


def test_question_and_template_of_a_translation(shared_data: Path) -> None:
    settings = {"format": "prompt_completion", "fields": {"completion": "modern"}, "prompt_template": "{classical}="}
    path = shared_data / "chat" / "classical-to-modern-zh.jsonl.xz"
    first = next(read_dialogues([ChatSource(path=str(path), **settings)], Report()))
    assert first.content.messages == [
        {"role": "user", "content": "阴阳天地殊异尔，故其大小善恶，一如天地之法旨也。="},
        {
            "role": "assistant",
            "content": "司天、在泉的阴阳属性不同，其变为疫疠之气的大小善恶，和司天、在泉失守其位的变化规律是一致的。",
        },
    ]


@pytest.mark.parametrize(
    ("name", "rows", "skipped"),
    [("preferences.json.xz", 1100, {"a preference pair with equal sides": 6}), ("dpo-en.json.xz", 300, {})],
)
def test_every_row_of_a_real_set_is_a_pair_or_counted(
    shared_data: Path, name: str, rows: int, skipped: dict[str, int]
) -> None:
    report = Report()
    found = list(read_preferences([ChatSource(path=str(shared_data / "chat" / name))], report))
    assert report.skipped == skipped
    assert len(found) == rows - sum(skipped.values())
    assert all(row.content.prompt[-1]["role"] == "user" for row in found)
    assert {len(row.content.chosen) for row in found} == {len(row.content.rejected) for row in found} == {1}
