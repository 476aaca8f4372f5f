"""Conversations become tokens with targets: tools, foreign templates, what is too long, sources with weights."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import IGNORE
from moe_lm.data.examples import ChatExample, read_chat, read_examples
from moe_lm.text.files import Report, read_rows
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.chat.foreign import CHATML, GLM, MISTRAL, save


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def text_of(item: ChatExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([*item.input_ids.tolist(), max(0, item.targets[-1])], skip_special=False)


def learnt(item: ChatExample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([id_ for id_ in item.targets.tolist() if id_ != IGNORE], skip_special=False)


def test_targets_are_the_next_tokens_of_the_assistant(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    messages = [user("q"), assistant("one"), user("r"), assistant("two")]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    [item] = read_chat(ChatDataConfig(train=(path,)), tiny_tokenizer).train
    ids, loss_mask = tiny_tokenizer.encode_chat(messages)
    assert item.input_ids.tolist() == ids[:-1]
    assert item.targets.tolist() == [
        id_ if trained else IGNORE for id_, trained in zip(ids[1:], loss_mask[1:], strict=True)
    ]
    assert learnt(item, tiny_tokenizer) == "one<|end|>two<|end|>"
    assert (item.where, item.source) == ("a.jsonl:1", 0)


def test_a_masked_answer_is_context_and_no_target(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    masked = [user("q"), assistant("one") | {"weight": 0}, user("r"), assistant("two")]
    plain = [{key: message[key] for key in ("role", "content")} for message in masked]
    rows = [{"messages": plain}, {"messages": masked}, {"messages": masked[:2]}]
    path = write(tmp_path / "a.jsonl", rows)
    for tokenizer, end in (
        (tiny_tokenizer, "two<|end|>"),
        (Tokenizer.load(save(CHATML, tmp_path / "chatml")), "<think>\n\n</think>\n\ntwo<|im_end|>"),
        (Tokenizer.load(save(GLM, tmp_path / "glm")), "\ntwo<|user|>"),
    ):
        data = read_chat(ChatDataConfig(train=(path,)), tokenizer)
        one, other = data.train
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert learnt(other, tokenizer) == end
        assert learnt(one, tokenizer).endswith(end)
        assert "one" in learnt(one, tokenizer)
        assert data.report.skipped_lines() == [
            "1 skipped: every assistant message is masked by weight, train or loss (first: a.jsonl:3)"
        ]


def test_a_last_answer_that_is_masked_is_not_ended(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(GLM, tmp_path / "glm"))
    messages = [user("q"), assistant("one"), user("r"), assistant("two") | {"train": False}]
    [item] = read_chat(ChatDataConfig(train=(write(tmp_path / "a.jsonl", [{"messages": messages}]),)), tokenizer).train
    assert learnt(item, tokenizer) == "\none<|user|>"
    ids, _ = tokenizer.encode_chat(messages)
    assert item.input_ids.tolist() == ids[:-1]


def test_the_history_of_an_instruction_is_trained_on(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    row = {"instruction": "three?", "output": "3", "history": [["one?", "1"], ["two?", "2"]]}
    [item] = read_chat(ChatDataConfig(train=(write(tmp_path / "a.jsonl", [row]),)), tiny_tokenizer).train
    assert learnt(item, tiny_tokenizer) == "1<|end|>2<|end|>3<|end|>"
    assert "<|user|>one?<|end|><|assistant|>1<|end|><|user|>two?" in text_of(item, tiny_tokenizer)


def test_tools_and_calls_reach_the_template(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    row = {"messages": [user("q"), {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]}
    [item] = read_chat(ChatDataConfig(train=(write(tmp_path / "a.jsonl", [row]),)), tiny_tokenizer).train
    assert '<|system|>Tools:\n{"type": "function", "function": {"name": "f"}}<|end|>' in text_of(item, tiny_tokenizer)
    assert learnt(item, tiny_tokenizer) == '<tool_call>{"name": "f", "arguments": {}}</tool_call><|end|>'


def test_an_answer_that_the_next_turn_would_end_is_ended(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(GLM, tmp_path / "glm"))
    path = write(tmp_path / "a.jsonl", [{"messages": [user("q"), assistant("one"), user("r"), assistant("two")]}])
    [item] = read_chat(ChatDataConfig(train=(path,)), tokenizer).train
    assert learnt(item, tokenizer) == "\none<|user|>\ntwo<|user|>"


def test_what_a_template_refuses_is_counted_with_its_reason(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(MISTRAL, tmp_path / "mistral"))
    system = {"role": "system", "content": "s"}
    rows = [{"messages": [system, user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}]
    data = read_chat(ChatDataConfig(train=(write(tmp_path / "a.jsonl", rows),)), tokenizer)
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


def lengths(tokenizer: Tokenizer) -> list[int]:
    """Targets of the conversation, of it from the second question on, and from the third."""
    return [len(tokenizer.encode_chat([LONG[0], *LONG[start:]])[0]) - 1 for start in (1, 3, 5)]


def test_what_is_too_long_is_skipped_by_default(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": LONG[3:]}])
    data = read_chat(ChatDataConfig(train=(path,), sequence_length=lengths(tiny_tokenizer)[0] - 1), tiny_tokenizer)
    assert len(data.train) == 1
    assert data.report.skipped_lines() == [
        f"1 skipped: longer than sequence_length={lengths(tiny_tokenizer)[0] - 1} (first: a.jsonl:1)"
    ]


@pytest.mark.parametrize(("kept", "spare", "start"), [(0, 0, 1), (0, -1, 3), (1, 0, 3), (1, -1, 5), (2, 0, 5)])
def test_truncating_left_drops_whole_turns_and_keeps_the_system_prompt(
    tmp_path: Path, tiny_tokenizer: Tokenizer, kept: int, spare: int, start: int
) -> None:
    length = lengths(tiny_tokenizer)[kept] + spare
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}])
    data = read_chat(ChatDataConfig(train=(path,), sequence_length=length, truncate="left"), tiny_tokenizer)
    [item] = data.train
    assert text_of(item, tiny_tokenizer) == tiny_tokenizer.render_chat([LONG[0], *LONG[start:]])
    dropped = f"oldest turns dropped to fit into sequence_length={length}"
    assert data.report.shortened == ({dropped: 1} if start > 1 else {})
    assert data.report.skipped == {}


def test_truncating_left_drops_masked_turns_as_any_other(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [{"messages": [turn | {"weight": 0} if number in (2, 4) else turn for number, turn in enumerate(LONG)]}]
    path, length = write(tmp_path / "a.jsonl", rows), lengths(tiny_tokenizer)[1]
    data = read_chat(ChatDataConfig(train=(path,), sequence_length=length, truncate="left"), tiny_tokenizer)
    [item] = data.train
    assert text_of(item, tiny_tokenizer) == tiny_tokenizer.render_chat([LONG[0], *LONG[3:]])
    assert learnt(item, tiny_tokenizer) == "three<|end|>"
    assert data.report.shortened == {f"oldest turns dropped to fit into sequence_length={length}": 1}


def test_no_end_without_a_target_is_kept(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [{"messages": [turn | {"weight": 0} if number == 6 else turn for number, turn in enumerate(LONG)]}]
    path, length = write(tmp_path / "a.jsonl", rows), lengths(tiny_tokenizer)[1] - 1
    report = Report()
    assert read_examples([ChatSource(path=str(path))], tiny_tokenizer, length, report, shorten=True) == []
    assert report.skipped == {f"longer than sequence_length={length}": 1}


def test_what_no_turn_less_makes_fit_is_skipped(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    length = lengths(tiny_tokenizer)[2] - 1
    report = Report()
    path = write(tmp_path / "a.jsonl", [{"messages": LONG}, {"messages": [*LONG, user("an open question")]}])
    assert read_examples([ChatSource(path=str(path))], tiny_tokenizer, length, report, shorten=True) == []
    assert report.skipped == {f"longer than sequence_length={length}": 2}
    assert report.shortened == {}


# Sources


def test_a_source_with_a_weight_needs_a_conversation(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    good = write(tmp_path / "good.jsonl", [{"messages": [user("q"), assistant("a")]}])
    bad = write(tmp_path / "bad.jsonl", [{"messages": [user("q")]}])
    sources = [{"path": str(good), "weight": 2}, {"path": str(bad), "weight": 1}]
    with pytest.raises(
        UsageError, match=r"bad\.jsonl has no usable conversation: 1 skipped: no assistant message with text"
    ):
        read_chat(ChatDataConfig(train=sources), tiny_tokenizer)
    without = read_chat(ChatDataConfig(train=[good, bad]), tiny_tokenizer)
    assert [item.source for item in without.train] == [0]


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
