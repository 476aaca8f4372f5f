"""Pieces of text: whole characters, and not a letter of a stop string."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lm.common.errors import UsageError
from moe_lm.generate.decode import Step
from moe_lm.generate.text import Row, Speed
from moe_lm.tokenizer.tokenizer import Tokenizer

TEXT = "naïve café — 你好，世界 👩‍👩‍👧 and plain words"


def written(ids: Iterable[int], decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> list[str]:
    """The texts, none of them empty, that the steps of a row add until a stop string or the last one ends it."""
    row, texts = Row(0, decode, stop), []
    for step in [*(Step(0, token) for token in ids), Step(0, None, "length")]:
        delta = row.take(step)
        assert delta.start == len("".join(texts))
        texts += [delta.text] if delta.text else []
        if delta.finish is not None:
            break
    return texts


def bytes_of(tokens: list[bytes], stop: tuple[str, ...] = ()) -> list[str]:
    """The texts that a row of tokens with these bytes is written in."""
    return written(range(len(tokens)), lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), stop)


def before_first_complete_stop(text: str, stop: tuple[str, ...]) -> str:
    """Letter by letter: the text up to where the first stop string to be complete begins."""
    for end in range(len(text) + 1):
        complete = [item for item in stop if text[:end].endswith(item)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def test_pieces_of_real_tokens_are_the_text_in_whole_characters(tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode(TEXT)
    pieces = written(ids, tiny_tokenizer.decode)
    assert "".join(pieces) == TEXT
    assert len(pieces) > 20
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_its_last_byte() -> None:
    assert bytes_of([b"a", b"\xe4", b"\xbd", b"\xa0b", b"c\xe5", b"\xa5\xbd"]) == ["a", "你b", "c", "好"]


def test_a_character_cut_by_the_end_is_dropped() -> None:
    assert bytes_of([b"ab", b"\xf0\x9f"]) == ["ab"]


def test_bytes_that_are_no_text_are_replaced_and_do_not_hold_up_the_rest() -> None:
    assert bytes_of([b"a\xff", b"\xff", b"\xff", b"b"]) == ["a", "\ufffd", "\ufffd", "\ufffdb"]


@given(st.lists(st.binary(max_size=5), max_size=20))
def test_pieces_of_any_bytes_are_what_the_whole_decodes_to(tokens: list[bytes]) -> None:
    assert "".join(bytes_of(tokens)) == b"".join(tokens).decode(errors="replace").removesuffix("\ufffd")


def test_a_stop_string_split_over_tokens_never_shows() -> None:
    assert bytes_of([b"one ", b"EN", b"D", b" two"], stop=("END",)) == ["one "]


def test_what_only_begins_like_a_stop_string_is_shown() -> None:
    assert bytes_of([b"one EN", b"OUGH E", b"N"], stop=("END",)) == ["one ", "ENOUGH ", "EN"]


def test_a_stop_string_overlapping_itself_is_found() -> None:
    assert "".join(bytes_of([b"a", b"a", b"a", b"b"], stop=("aab",))) == "a"


@given(
    st.lists(st.text("ab你", max_size=3), max_size=12),
    st.lists(st.text("ab你", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stop: tuple[str, ...]) -> None:
    tokens = [piece.encode() for piece in pieces]
    assert "".join(bytes_of(tokens, stop)) == before_first_complete_stop("".join(pieces), stop)


def test_a_stop_string_ends_a_row_before_its_decoder_does() -> None:
    row = Row(7, lambda ids: "".join(map(str, ids)), stop=("23",), prefix="ab")
    deltas = [row.take(Step(0, token)) for token in range(4)]
    assert [(delta.row, delta.text, delta.start, delta.finish) for delta in deltas] == [
        (7, "ab0", 0, None), (7, "1", 3, None), (7, "", 4, None), (7, "", 4, "stop"),
    ]  # fmt: skip


def test_speed_counts_tokens_and_not_steps_without_one() -> None:
    row, speed = Row(0, str), Speed()
    speed.see(row.take(Step(0, 5)))
    speed.see(row.take(Step(0, None, "stop")))
    assert str(speed) == "1 tokens"
    speed.see(row.take(Step(0, 5)))
    assert re.fullmatch(r"2 tokens, \d+\.\d tokens/s", str(speed))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        Row(0, str, stop=("a", ""))
