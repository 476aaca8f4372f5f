"""Preference pairs: what is rendered and trained on, what is refused, and rows that hold pairs whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig
from moe_lm.data.batches import IGNORE
from moe_lm.data.packing import RowBatches
from moe_lm.data.pairs import Pair, PairRows, read_pairs
from moe_lm.data.records import Splits
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.data.rows import assistant, user, write
from tests.tiny import positions_of

GOOD = {"prompt": "Name a colour.", "chosen": "Green, as leaves are.", "rejected": "No."}


Read = Callable[..., Splits[Pair]]


@pytest.fixture
def read(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Read:
    """Reads rows, which are `pairs.jsonl` in a folder, as pairs of at most 48 tokens a side."""

    def read(rows: list[dict[str, Any]], **settings: Any) -> Splits[Pair]:
        train = [write(tmp_path / "pairs.jsonl", rows)]
        return read_pairs(ChatDataConfig(train=train, sequence_length=48, **settings), tiny_tokenizer)

    return read


def forty() -> list[dict[str, Any]]:
    words = "apple river stone cloud paper green seven table".split()
    return [
        {"prompt": f"say {number} {words[number % 8]}", "chosen": " ".join(words[: number % 5 + 1]), "rejected": "no"}
        for number in range(40)
    ]


def test_the_answer_and_its_end_alone_are_targets(read: Read, tiny_tokenizer: Tokenizer) -> None:
    said = [user("Hello"), assistant("Good day."), user("Name a colour.")]
    prompt = [{"role": "system", "content": "Be brief."}, *said]
    [pair] = read([GOOD | {"prompt": prompt}]).train
    told = tiny_tokenizer.encode_chat(prompt, add_generation_prompt=True)[0]
    for side, answer in zip(pair.sides, (GOOD["chosen"], GOOD["rejected"]), strict=True):
        expected = [*tiny_tokenizer.encode(answer), tiny_tokenizer.end_id]
        assert side.targets.tolist() == [IGNORE] * (len(told) - 1) + expected
        assert side.input_ids.tolist() == told + expected[:-1]


def test_what_cannot_be_compared_is_counted_with_the_reason(read: Read) -> None:
    rows = [GOOD, GOOD | {"rejected": GOOD["chosen"]}, GOOD | {"rejected": "word " * 60}, {"prompt": "Why?"}]
    data = read(rows)
    assert (len(data.train), data.report.documents) == (1, 1)
    assert data.report.skipped_lines()[:2] == [
        "1 skipped: a preference pair with equal sides (first: pairs.jsonl:2)",
        "1 skipped: a side longer than sequence_length=48 (first: pairs.jsonl:3)",
    ]
    assert sum(data.report.skipped.values()) == 3


def test_nothing_to_prefer_is_refused(read: Read) -> None:
    message = "has no usable preference pair: 1 skipped: a preference pair with equal sides"
    with pytest.raises(UsageError, match=message):
        read([GOOD | {"rejected": GOOD["chosen"]}])


def test_pairs_of_a_prompt_stay_on_one_side_of_the_split(read: Read) -> None:
    rows = [{"prompt": f"q{number // 2}", "chosen": f"a{number}", "rejected": "b"} for number in range(200)]
    data = read(rows, validation_fraction=0.1)
    lines = [[int(pair.where.split(":")[1]) for pair in side] for side in (data.train, data.validation)]
    train, held_out = ({rows[line - 1]["prompt"] for line in side} for side in lines)
    assert len(data.train) + len(data.validation) == 200
    assert 4 < len(data.validation) < 50
    assert not train & held_out


@pytest.fixture
def rows(read: Read, tiny_tokenizer: Tokenizer) -> PairRows:
    found = PairRows(read(forty()).train, 48, tiny_tokenizer.pad_id)
    found.set_reference(np.arange(80, dtype=np.float32).reshape(40, 2))
    return found


def test_rows_hold_whole_pairs_and_answers_attend_apart(rows: PairRows) -> None:
    seen = []
    for numbers in (range(2), range(2, len(rows) + 1)):
        batch, pairs = rows.batch(numbers), [pair for row in rows.items_in(numbers) for pair in row]
        assert batch.answers is not None
        assert batch.reference is not None
        assert batch.input_ids.shape == (len(numbers), 96)
        for place, number in enumerate(pairs):
            for side in range(2):
                at = batch.answers == 2 * place + side
                expected = rows.pairs[number].sides[side]
                assert batch.input_ids[at].tolist() == expected.input_ids.tolist()
                assert batch.targets[at].tolist() == expected.targets.tolist()
                assert positions_of(batch)[at].tolist() == list(range(len(expected.input_ids)))
            places = [set((batch.answers == 2 * place + side).nonzero()[:, 0].tolist()) for side in range(2)]
            assert places[0] == places[1]
            assert len(places[0]) == 1
            assert batch.reference[place].tolist() == rows.reference[number].tolist()
        assert (batch.targets[batch.answers == 2 * len(pairs)] == IGNORE).all()
        seen += pairs
    assert sorted(seen) == list(range(40))


def test_slices_of_a_batch_and_one_visit_of_every_row(rows: PairRows) -> None:
    batches = RowBatches(rows, 4, seed=7)
    whole = batches.batch(1, range(4))
    parts = [batches.batch(1, range(n, n + 1)) for n in range(4)]
    assert whole.input_ids.tolist() == [row for part in parts for row in part.input_ids.tolist()]
    assert whole.num_pairs == sum(part.num_pairs for part in parts)
    epoch = [batches.batch(0, range(n, n + 1)).input_ids.tolist() for n in range(len(rows))]
    assert sorted(epoch) == sorted(rows.batch([n]).input_ids.tolist() for n in range(len(rows)))


def test_the_fingerprint_tells_of_every_token(rows: PairRows) -> None:
    before = rows.fingerprint
    assert PairRows(rows.pairs, 48, 2).fingerprint == RowBatches(rows, 4, seed=7).fingerprint == before
    assert PairRows(rows.pairs[:-1], 48, 2).fingerprint != before
    for change in (rows.pairs[3].rejected.input_ids, rows.pairs[5].chosen.targets):
        change[-1] += 1
        assert rows.fingerprint != before
        change[-1] -= 1
    assert rows.fingerprint == before
