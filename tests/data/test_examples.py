"""Conversations become tokens with targets: masks, tools, foreign templates, what is too long, sources and splits."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import IGNORE
from moe_lm.data.examples import ChatExample, read_chat, read_examples
from moe_lm.data.packing import pack_rows
from moe_lm.data.records import Splits
from moe_lm.text.files import Report, read_rows
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.data.rows import assistant, said, user, write
from tests.tokenizer.chat.foreign import CHATML, GLM, MISTRAL, save

ASKED_TWICE = [user("q"), assistant("one"), user("r"), assistant("two")]


Read = Callable[..., Splits[ChatExample]]


@pytest.fixture
def read(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Read:
    """Reads rows, which are `a.jsonl` in a folder, as examples."""

    def read(*rows: Any, tokenizer: Tokenizer = tiny_tokenizer, **settings: Any) -> Splits[ChatExample]:
        return read_chat(ChatDataConfig(train=(write(tmp_path / "a.jsonl", rows),), **settings), tokenizer)

    return read


def text_of(item: ChatExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([*item.input_ids.tolist(), max(0, item.targets[-1])], skip_special=False)


def learnt(item: ChatExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([id_ for id_ in item.targets.tolist() if id_ != IGNORE], skip_special=False)


@pytest.fixture
def glm(tmp_path: Path) -> Tokenizer:
    """A template whose answers end with the token that begins the next turn."""
    return Tokenizer.load(save(GLM, tmp_path / "glm"))


def test_targets_are_the_next_tokens_of_the_assistant(read: Read, tiny_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASKED_TWICE[:3], assistant("Yes, <|end|> of story.")]
    [item] = read({"messages": messages}).train
    ids, loss_mask = tiny_tokenizer.encode_chat(messages)
    assert item.input_ids.tolist() == ids[:-1]
    assert item.targets.tolist() == [
        id_ if trained else IGNORE for id_, trained in zip(ids[1:], loss_mask[1:], strict=True)
    ]
    trained, end = [id_ for id_ in item.targets.tolist() if id_ != IGNORE], tiny_tokenizer.end_id
    assert trained == [*tiny_tokenizer.encode("one"), end, *tiny_tokenizer.encode("Yes, <|end|> of story."), end]
    assert (item.where, item.source) == ("a.jsonl:1", 0)


def test_both_shapes_give_the_same_conversation(read: Read) -> None:
    rows = [
        {"instruction": "Correct this.", "input": "freind", "output": "friend"},
        said("Correct this.\n\nfreind", "friend"),
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {"instruction": "Say hello.", "output": "Hello."},
        said("Say hello.", "Hello."),
    ]
    data = read(*rows)
    ids = [item.input_ids.tolist() for item in data.train]
    assert ids == [*[ids[0]] * 2, *[ids[2]] * 3]
    assert len({item.hash for item in data.train}) == 2
    assert (data.report.documents, data.report.skipped) == (5, {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said("a question without an answer"), "no assistant message with text"),
        (said("question", "half a pair: \ud800"), "invalid UTF-8"),
        (said("question", "words " * 600), "longer than sequence_length=512"),
        ([1, 2], "row is not an object"),
    ],
)
def test_a_bad_row_is_skipped_counted_and_named(read: Read, row: Any, reason: str) -> None:
    data = read(said("a", "b"), row, said("c", "d"))
    assert len(data.train) == data.report.documents == 2
    assert (data.report.skipped, data.report.examples) == ({reason: 1}, {reason: "a.jsonl:2"})


def test_a_masked_answer_is_context_and_no_target(
    read: Read, tmp_path: Path, tiny_tokenizer: Tokenizer, glm: Tokenizer
) -> None:
    masked = [user("q"), assistant("one", weight=0), *ASKED_TWICE[2:]]
    for tokenizer, end in (
        (tiny_tokenizer, "two<|end|>"),
        (Tokenizer.load(save(CHATML, tmp_path / "chatml")), "<think>\n\n</think>\n\ntwo<|im_end|>"),
        (glm, "\ntwo<|user|>"),
    ):
        data = read(*({"messages": turns} for turns in (ASKED_TWICE, masked, masked[:2])), tokenizer=tokenizer)
        one, other = data.train
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert learnt(other, tokenizer) == end
        assert learnt(one, tokenizer).endswith(end)
        assert "one" in learnt(one, tokenizer)
        assert data.report.skipped_lines() == [
            "1 skipped: every assistant message is masked by weight, train or loss (first: a.jsonl:3)"
        ]


def test_a_last_answer_that_is_masked_is_not_ended(read: Read, glm: Tokenizer) -> None:
    messages = [*ASKED_TWICE[:3], assistant("two", train=False)]
    [item] = read({"messages": messages}, tokenizer=glm).train
    assert learnt(item, glm) == "\none<|user|>"
    ids, _ = glm.encode_chat(messages)
    assert item.input_ids.tolist() == ids[:-1]


def test_an_answer_that_the_next_turn_would_end_is_ended(read: Read, glm: Tokenizer) -> None:
    [item] = read({"messages": ASKED_TWICE}, tokenizer=glm).train
    assert learnt(item, glm) == "\none<|user|>\ntwo<|user|>"


def test_the_history_of_an_instruction_is_trained_on(read: Read, tiny_tokenizer: Tokenizer) -> None:
    row = {"instruction": "three?", "output": "3", "history": [["one?", "1"], ["two?", "2"]]}
    [item] = read(row).train
    assert learnt(item, tiny_tokenizer) == "1<|end|>2<|end|>3<|end|>"
    assert "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?" in text_of(item, tiny_tokenizer)


def test_tools_and_calls_reach_the_template(read: Read, tiny_tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    row = {"messages": [user("q"), {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]}
    [item] = read(row).train
    assert '<|system|>Tools:\n{"type": "function", "function": {"name": "f"}}<|end|>' in text_of(item, tiny_tokenizer)
    assert learnt(item, tiny_tokenizer) == '<tool_call>{"name": "f", "arguments": {}}</tool_call><|end|>'


def test_what_a_template_refuses_is_counted_with_its_reason(read: Read, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(MISTRAL, tmp_path / "mistral"))
    with_system = {"messages": [{"role": "system", "content": "s"}, *said("q", "a")["messages"]]}
    data = read(with_system, said("q", "a"), tokenizer=tokenizer)
    assert len(data.train) == 1
    assert data.report.skipped_lines() == [
        "1 skipped: the tokenizer's chat template failed: only user, assistant and tool are supported "
        "(first: a.jsonl:1)"
    ]


def test_a_tokenizer_without_a_chat_template_is_refused_at_once(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    files = tiny_tokenizer.files()
    config = json.loads(files["tokenizer_config.json"])
    del config["chat_template"]
    for name, content in (files | {"tokenizer_config.json": json.dumps(config)}).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=r"no chat template; add chat_template\.jinja"):
        read_chat(ChatDataConfig(train=(tmp_path / "none.jsonl",)), Tokenizer.load(tmp_path))


# What is too long


LONG = [
    {"role": "system", "content": "Be brief."},
    *[user("first " * 20), assistant("one " * 20)],
    *[user("second"), assistant("two")],
    *[user("third"), assistant("three")],
]


def masked_at(*places: int) -> dict[str, Any]:
    """LONG with these answers masked."""
    return {"messages": [turn | ({"weight": 0} if place in places else {}) for place, turn in enumerate(LONG)]}


def lengths(tokenizer: Tokenizer) -> list[int]:
    """Targets of the conversation, of it from the second question on, and from the third."""
    return [len(tokenizer.encode_chat([LONG[0], *LONG[start:]])[0]) - 1 for start in (1, 3, 5)]


def test_what_is_too_long_is_skipped_by_default(read: Read, tiny_tokenizer: Tokenizer) -> None:
    length = lengths(tiny_tokenizer)[0]
    rows = {"messages": LONG}, {"messages": LONG[3:]}
    assert len(read(*rows, sequence_length=length).train) == 2
    data = read(*rows, sequence_length=length - 1)
    assert len(data.train) == 1
    assert data.report.skipped_lines() == [f"1 skipped: longer than sequence_length={length - 1} (first: a.jsonl:1)"]


@pytest.mark.parametrize(("kept", "spare", "start"), [(0, 0, 1), (0, -1, 3), (1, 0, 3), (1, -1, 5), (2, 0, 5)])
def test_truncating_left_drops_whole_turns_and_keeps_the_system_prompt(
    read: Read, tiny_tokenizer: Tokenizer, kept: int, spare: int, start: int
) -> None:
    length = lengths(tiny_tokenizer)[kept] + spare
    data = read({"messages": LONG}, sequence_length=length, truncate="left")
    [item] = data.train
    assert text_of(item, tiny_tokenizer) == tiny_tokenizer.render_chat([LONG[0], *LONG[start:]])
    dropped = f"oldest turns dropped to fit into sequence_length={length}"
    assert data.report.shortened == ({dropped: 1} if start > 1 else {})
    assert data.report.skipped == {}


def test_truncating_left_drops_masked_turns_as_any_other(read: Read, tiny_tokenizer: Tokenizer) -> None:
    length = lengths(tiny_tokenizer)[1]
    data = read(masked_at(2, 4), sequence_length=length, truncate="left")
    [item] = data.train
    assert text_of(item, tiny_tokenizer) == tiny_tokenizer.render_chat([LONG[0], *LONG[3:]])
    assert learnt(item, tiny_tokenizer) == "three<|end|>"
    assert data.report.shortened == {f"oldest turns dropped to fit into sequence_length={length}": 1}


@pytest.mark.parametrize(
    ("shorter_than", "rows"),
    [
        (1, [masked_at(6)]),  # its last ending that fits has no target
        (2, [{"messages": LONG}, {"messages": [*LONG, user("an open question")]}]),  # no ending fits
    ],
)
def test_what_no_turn_less_makes_fit_is_skipped(
    tmp_path: Path, tiny_tokenizer: Tokenizer, shorter_than: int, rows: list[Any]
) -> None:
    length, report = lengths(tiny_tokenizer)[shorter_than] - 1, Report()
    sources = [ChatSource(path=str(write(tmp_path / "a.jsonl", rows)))]
    assert read_examples(sources, tiny_tokenizer, length, report, shorten=True) == []
    assert report.skipped == {f"longer than sequence_length={length}": len(rows)}
    assert report.shortened == {}


# Sources and splits


def test_a_source_with_a_weight_needs_a_conversation(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    good = write(tmp_path / "good.jsonl", [said("q", "a")])
    bad = write(tmp_path / "bad.jsonl", [said("q")])
    sources = [{"path": str(good), "weight": 2}, {"path": str(bad), "weight": 1}]
    message = r"bad\.jsonl has no usable conversation: 1 skipped: no assistant message with text"
    with pytest.raises(UsageError, match=message):
        read_chat(ChatDataConfig(train=sources), tiny_tokenizer)
    without = read_chat(ChatDataConfig(train=[good, bad]), tiny_tokenizer)
    assert [item.source for item in without.train] == [0]


def test_validation_may_come_from_files_of_its_own_or_out_of_training(read: Read, tmp_path: Path) -> None:
    rows = [said(f"question {number}", "answer") for number in range(100)]
    validation = write(tmp_path / "validation.jsonl", [said("a", "b")])
    apart = read(*rows, validation=(validation,))
    assert (len(apart.train), len(apart.validation), apart.report.documents) == (100, 1, 101)
    split = read(*rows, validation_fraction=0.1)
    assert len(split.train) + len(split.validation) == 100
    assert 3 < len(split.validation) < 20
    again = read(*rows[::-1], validation_fraction=0.1)
    assert {item.hash for item in again.validation} == {item.hash for item in split.validation}


def test_one_conversation_at_least_is_held_out_when_some_shall_be(read: Read) -> None:
    rows = [said("a", "b"), said("c", "d")]
    assert len(read(*rows, validation_fraction=0.001).validation) == 1


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        ([said("a", "b"), said("c", "d")], 0.999999, r".* validation_fraction holds all of it out"),
        ([{"text": "a"}], 0.0, r"1 skipped: no messages, .* \(first: a\.jsonl:1\)"),
    ],
)
def test_files_that_leave_nothing_to_train_on_are_refused(
    read: Read, rows: list[Any], fraction: float, message: str
) -> None:
    with pytest.raises(UsageError, match=f"no usable conversation: {message}"):
        read(*rows, validation_fraction=fraction)


# The real sets


def test_real_instructions_are_read_from_a_compressed_array(shared_data: Path, tiny_tokenizer: Tokenizer) -> None:
    path, report = shared_data / "chat" / "instructions.json.xz", Report()
    items = read_examples([ChatSource(path=str(path))], tiny_tokenizer, 256, report)
    with lzma.open(path) as file:
        rows = json.load(file)
    assert len(items) + sum(report.skipped.values()) == len(rows) == 1100
    assert len(items) > 1000
    text = tiny_tokenizer.decode([id_ for id_ in items[0].targets.tolist() if id_ not in (IGNORE, 6)])
    assert text == rows[0]["output"]
    rows_filled = pack_rows([len(item.input_ids) for item in items], 256)
    used = sum(len(item.input_ids) for item in items) / (256 * len(rows_filled))
    assert used > 0.95


def test_question_and_answer_pairs_are_trained_on_as_they_are(
    shared_data: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    rows = read_rows(shared_data / "chat" / "gsm8k-train.jsonl.xz", "gsm8k", Report())
    source = ChatSource(
        path=str(write(tmp_path / "gsm8k.jsonl", [row for _, row in islice(rows, 1000)])),
        fields={"prompt": "question", "completion": "answer"},
        system="Answer with a number after ####.",
    )
    data = read_chat(ChatDataConfig(train=[source], sequence_length=256, validation_fraction=0.05), tiny_tokenizer)
    assert len(data.train) + len(data.validation) + sum(data.report.skipped.values()) == 1000
    assert set(data.report.skipped) == {"longer than sequence_length=256"}
    assert 5 < len(data.validation) < 40
    assert text_of(data.train[0], tiny_tokenizer).startswith("<|bos|><|system|>Answer with a number after ####.<|end|>")
    assert "#### " in learnt(data.train[0], tiny_tokenizer)
