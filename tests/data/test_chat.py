import json
import lzma
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.examples import ChatBatches, ChatExample, chat_evaluation_batches, read_chat, read_examples
from moe_lm.data.order import MIX_BLOCK
from moe_lm.data.packing import pack_rows
from moe_lm.text.sources import Report
from moe_lm.tokenizer.tokenizer import Tokenizer

PAD = 2
NO_ROLE = "a message whose role is not one of system, user, assistant, tool"
NO_FORMAT = "no messages, conversations, instruction with output, or prompt with completion"


def said(*turns: str) -> dict[str, Any]:
    """A row of `messages`: user and assistant in turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: Tokenizer, length: int = 512) -> tuple[list[ChatExample], Report]:
    report = Report()
    return read_examples([ChatSource(path=str(path))], tokenizer, length, report), report


def conversation(first: int, tokens: int, trained: int) -> ChatExample:
    """Tokens that count up from `first`; the last `trained` of them are the assistant's."""
    ids = np.arange(first, first + tokens, dtype=np.int32)
    targets = ids[1:].copy()
    targets[: tokens - 1 - trained] = IGNORE
    return ChatExample(ids[:-1], targets, hash=first)


# Nine, five, four and three tokens: 8 + 4 + 3 + 2 inputs, of which the first fills a row of 8.
FOUR = [conversation(100, 9, 2), conversation(200, 5, 1), conversation(300, 4, 3), conversation(400, 3, 1)]


def test_packing_by_hand() -> None:
    [batch] = chat_evaluation_batches(FOUR, 8, 3, separate_documents=True, pad_id=PAD)
    assert batch.input_ids.tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 107],
        [200, 201, 202, 203, 300, 301, 302, PAD],
        [400, 401, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.targets.tolist() == [
        [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 107, 108],
        [IGNORE, IGNORE, IGNORE, 204, 301, 302, 303, IGNORE],
        [IGNORE, 402, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 0, 1, 2, 0],
        [0, 1, 0, 1, 2, 3, 4, 5],
    ]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 15, 16, 18, 24]
    assert (batch.max_seqlen, batch.num_targets) == (8, 7)


def test_packing_by_hand_with_attention_across_conversations() -> None:
    [batch] = chat_evaluation_batches(FOUR, 8, 3, separate_documents=False, pad_id=PAD)
    assert batch.cu_seqlens.tolist() == [0, 8, 15, 16, 18, 24]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_only_the_assistant_is_trained_on_token_by_token(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    row = said("What is 2 + 2?", "Four.", "Sure?", "Yes, <|end|> of story.")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    [item], _ = read(write(tmp_path / "a.jsonl", [row]), tiny_tokenizer)
    ids, loss_mask = tiny_tokenizer.encode_chat(row["messages"])
    assert item.input_ids.tolist() == ids[:-1]
    assert item.targets.tolist() == [
        id_ if trained else IGNORE for id_, trained in zip(ids[1:], loss_mask[1:], strict=True)
    ]
    trained = [target for target in item.targets.tolist() if target != IGNORE]
    end = tiny_tokenizer.end_id
    assert trained == [*tiny_tokenizer.encode("Four."), end, *tiny_tokenizer.encode("Yes, <|end|> of story."), end]


def test_both_shapes_give_the_same_conversation(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    rows = [
        {"instruction": "Correct this.", "input": "freind", "output": "friend"},
        said("Correct this.\n\nfreind", "friend"),
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {"instruction": "Say hello.", "output": "Hello."},
        said("Say hello.", "Hello."),
    ]
    items, report = read(write(tmp_path / "a.jsonl", rows), tiny_tokenizer)
    assert [item.input_ids.tolist() for item in items] == [
        *[items[0].input_ids.tolist()] * 2,
        *[items[2].input_ids.tolist()] * 3,
    ]
    assert len({item.hash for item in items}) == 2
    assert (report.documents, report.skipped) == (5, {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "no conversation"}, NO_FORMAT),
        ({"messages": []}, "no messages"),
        ({"messages": "hello"}, "messages that are not a list"),
        ({"messages": ["hello"]}, "a message that is not an object"),
        ({"messages": [{"role": "robot", "content": "a"}]}, NO_ROLE),
        ({"messages": [{"role": ["user"], "content": "a"}]}, NO_ROLE),
        ({"messages": [{"role": "user"}]}, "a message whose content is not text"),
        ({"instruction": "a", "output": None}, "a message whose content is not text"),
        ({"instruction": None, "input": "a", "output": "b"}, "a message whose content is not text"),
        (said("a question without an answer"), "no assistant message with text"),
        (said("question", " \n"), "no assistant message with text"),
        (said("question", "half a pair: \ud800"), "invalid UTF-8"),
        (said("question", "a\0b"), "NUL byte"),
        (said("question", "words " * 600), "longer than sequence_length=512"),
        ([1, 2], "row is not an object"),
    ],
)
def test_a_bad_row_is_skipped_counted_and_named(
    tmp_path: Path, tiny_tokenizer: Tokenizer, row: Any, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", [said("a", "b"), row, said("c", "d")])
    items, report = read(path, tiny_tokenizer)
    assert len(items) == report.documents == 2
    assert (report.skipped, report.examples) == ({reason: 1}, {reason: "a.jsonl:2"})


def test_a_conversation_that_just_fits_is_kept_whole(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [said("question", "answer " * 30)])
    [item], _ = read(path, tiny_tokenizer)
    size = len(item.input_ids)
    assert len(read(path, tiny_tokenizer, size)[0]) == 1
    assert read(path, tiny_tokenizer, size - 1)[1].skipped == {f"longer than sequence_length={size - 1}": 1}


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=200))
def test_rows_hold_every_item_once_and_are_not_overfull(lengths: list[int]) -> None:
    rows = pack_rows(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    fill = [sum(lengths[item] for item in row) for row in rows]
    assert max(fill, default=0) <= 50
    # Any two rows would not fit into one, so that on average they are more than half full.
    assert sum(sorted(fill)[:2]) > 50 or len(rows) < 2


def random_conversations(count: int) -> list[ChatExample]:
    rng = np.random.default_rng(0)
    return [conversation(1000 * number, int(rng.integers(2, 60)), 1) for number in range(1, count + 1)]


def chat_batches(conversations: list[ChatExample], seed: int = 1) -> ChatBatches:
    return ChatBatches(conversations, 64, 8, seed, separate_documents=True, pad_id=PAD)


def first_tokens(batches: Sequence[Batch]) -> list[int]:
    return [int(batch.input_ids[row, 0]) for batch in batches for row in range(len(batch.input_ids))]


def test_every_row_comes_once_an_epoch_in_a_new_order() -> None:
    batches = ChatBatches(random_conversations(100), 64, 1, 1, separate_documents=True, pad_id=PAD)
    size = batches.steps_per_epoch
    epochs = [first_tokens([batches.batch(epoch * size + step, range(1)) for step in range(size)]) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(set(epochs[0])) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_an_epoch_trains_on_every_conversation_whole() -> None:
    items = random_conversations(100)
    seen = torch.cat([batch.targets.flatten() for batch in chat_evaluation_batches(items, 64, 8, True, PAD)])
    expected = np.concatenate([item.targets[item.targets != IGNORE] for item in items])
    assert sorted(seen[seen != IGNORE].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_slices_the_same_global_batch(ranks: int) -> None:
    batches = chat_batches(random_conversations(100))
    share = 8 // ranks
    for step in (0, 5, 3, 1000):
        whole = batches.batch(step, range(8))
        parts = [batches.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert torch.equal(torch.cat([part.position_ids for part in parts]), whole.position_ids)


def from_source(source: int, count: int) -> list[ChatExample]:
    """Conversations that fill a row each, and whose tokens tell the source."""
    return [
        replace(conversation(1000 * (100 * source + number), 64, 1), source=source) for number in range(1, count + 1)
    ]


def test_weights_are_shares_of_the_rows_and_each_source_has_epochs_of_its_own() -> None:
    items = [*from_source(0, 5), *from_source(1, 50)]
    batches = ChatBatches(items, 64, 8, 1, separate_documents=True, pad_id=PAD, weights=[3.0, 1.0])
    assert batches.steps_per_epoch == 7
    seen = first_tokens([batches.batch(step, range(8)) for step in range(MIX_BLOCK // 8)])
    first, second = [[token for token in seen if token // 100_000 == source] for source in (0, 1)]
    assert (len(first), len(second)) == (MIX_BLOCK * 3 // 4, MIX_BLOCK // 4)
    for mine, size in ((first, 5), (second, 50)):
        counts = Counter(mine).values()
        assert (len(counts), max(counts) - min(counts)) == (size, 1)
    assert first_tokens([batches.batch(17, range(3, 5))]) == seen[17 * 8 + 3 : 17 * 8 + 5]
    alone = ChatBatches(items, 64, 8, 1, separate_documents=True, pad_id=PAD)
    assert len(set(first_tokens([alone.batch(step, range(8)) for step in range(7)]))) == 55


def test_without_weights_sources_share_rows() -> None:
    small = [replace(item, source=number % 2) for number, item in enumerate(random_conversations(100))]
    together = ChatBatches(small, 64, 1, 1, separate_documents=True, pad_id=PAD).steps_per_epoch
    assert together == len(pack_rows([len(item.input_ids) for item in small], 64))


def test_the_fingerprint_is_that_of_tokens_and_targets_in_their_order() -> None:
    items = random_conversations(3)
    ignored = replace(items[0], targets=np.full_like(items[0].targets, IGNORE))
    others = [items[::-1], items[:2], [ignored, *items[1:]], [replace(items[0], source=1), *items[1:]]]
    assert len({chat_batches(list(group)).fingerprint for group in [items, *others]}) == 5
    assert chat_batches(items).fingerprint == chat_batches(random_conversations(3)).fingerprint


def test_another_seed_is_another_order() -> None:
    one, two = (first_tokens([chat_batches(random_conversations(100), seed).batch(0, range(8))]) for seed in (1, 2))
    assert one != two


def test_evaluation_batches_have_one_shape_and_the_last_is_filled_up() -> None:
    batches = list(chat_evaluation_batches(FOUR, 8, 2, separate_documents=True, pad_id=PAD))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 8), (2, 8)]
    assert batches[1].input_ids[1].tolist() == [PAD] * 8
    assert batches[1].num_targets == 1


def test_validation_may_come_from_files_of_its_own_or_out_of_training(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    rows = [said(f"question {number}", "answer") for number in range(100)]
    train, validation = write(tmp_path / "train.jsonl", rows), write(tmp_path / "validation.jsonl", [said("a", "b")])
    apart = read_chat(ChatDataConfig(train=(train,), validation=(validation,)), tiny_tokenizer)
    assert (len(apart.train), len(apart.validation), apart.report.documents) == (100, 1, 101)
    split = read_chat(ChatDataConfig(train=(train,), validation_fraction=0.1), tiny_tokenizer)
    assert len(split.train) + len(split.validation) == 100
    assert 3 < len(split.validation) < 20
    reversed_rows = write(tmp_path / "reversed.jsonl", rows[::-1])
    again = read_chat(ChatDataConfig(train=(reversed_rows,), validation_fraction=0.1), tiny_tokenizer)
    assert {item.hash for item in again.validation} == {item.hash for item in split.validation}


def test_one_conversation_at_least_is_held_out_when_some_shall_be(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [said("a", "b"), said("c", "d")])
    assert len(read_chat(ChatDataConfig(train=(path,), validation_fraction=0.001), tiny_tokenizer).validation) == 1


def test_a_file_that_is_held_out_whole_is_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [said("a", "b"), said("c", "d")])
    with pytest.raises(UsageError, match=r"no usable conversation: .* validation_fraction holds all of it out"):
        read_chat(ChatDataConfig(train=(path,), validation_fraction=0.999999), tiny_tokenizer)


def test_a_missing_file_is_named(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"conversations .*nowhere\.jsonl do not exist"):
        read(tmp_path / "nowhere.jsonl", tiny_tokenizer)


def test_files_without_a_usable_conversation_are_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match=r"no usable conversation: 1 skipped: no messages, .* \(first: a\.jsonl:1\)"):
        read_chat(ChatDataConfig(train=(path,)), tiny_tokenizer)


def test_real_instructions_are_read_from_a_compressed_array(shared_data: Path, tiny_tokenizer: Tokenizer) -> None:
    path = shared_data / "chat" / "instructions.json.xz"
    items, report = read(path, tiny_tokenizer, length=256)
    with lzma.open(path) as file:
        rows = json.load(file)
    assert len(items) + sum(report.skipped.values()) == len(rows) == 1100
    assert len(items) > 1000
    text = tiny_tokenizer.decode([id_ for id_ in items[0].targets.tolist() if id_ not in (IGNORE, 6)])
    assert text == rows[0]["output"]
    rows_filled = pack_rows([len(item.input_ids) for item in items], 256)
    used = sum(len(item.input_ids) for item in items) / (256 * len(rows_filled))
    assert used > 0.95
