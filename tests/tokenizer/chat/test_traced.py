"""Traced text is text: every method gives what a plain string's gives, and each character keeps its author."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.tokenizer.chat.traced import TEMPLATE, Traced, authors_of, concat, first_author, traced

TEXTS = st.text(st.sampled_from("ab \n\tß:<é"), max_size=12)
CUTS: list[Callable[[Any], Any]] = [
    lambda text: text[1:-1],
    lambda text: text[::-2],
    lambda text: list(text),
    lambda text: text.strip(),
    lambda text: text.strip("ab"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip(),
    lambda text: text.split(),
    lambda text: text.split(None, 1),
    lambda text: text.split("a"),
    lambda text: text.split("ab", 1)[-1],
    lambda text: text.rsplit(None, 1),
    lambda text: text.rsplit("b", 1),
    lambda text: text.splitlines(),
    lambda text: text.splitlines(keepends=True),
    lambda text: text.partition("a"),
    lambda text: text.rpartition("b"),
    lambda text: text.removeprefix("a").removesuffix("b"),
    lambda text: str(text),
]
CHANGES: list[Callable[[Any], Any]] = [
    lambda text: text.upper(),
    lambda text: text.lower(),
    lambda text: text.capitalize(),
    lambda text: text.title(),
    lambda text: text.replace("a", "xyz"),
    lambda text: text.replace("ab", "", 1),
    lambda text: text.replace("", "-"),
    lambda text: text * 2,
    lambda text: "<" + text + ">",
    lambda text: text.join(["x", text, ""]),
]


def flat(value: Any) -> Iterable[Any]:
    return [value] if isinstance(value, str) else value


def numbered(text: str) -> Traced:
    """Every character by another author."""
    return Traced(text, "".join(chr(1 + index) for index in range(len(text))))


@settings(max_examples=40)
@given(TEXTS)
@pytest.mark.parametrize("cut", CUTS)
def test_what_is_cut_out_keeps_its_authors(cut: Callable[[Any], Any], text: str) -> None:
    pieces = list(flat(cut(numbered(text))))
    assert pieces == list(flat(cut(text)))
    for piece in pieces:
        assert isinstance(piece, Traced)
        assert str.__str__(piece) == "".join(text[ord(author) - 1] for author in piece.authors)


@settings(max_examples=40)
@given(TEXTS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_together_has_an_author_for_each_character(change: Callable[[Any], Any], text: str) -> None:
    changed = change(numbered(text))
    assert changed == change(text)
    assert isinstance(changed, Traced)
    assert len(changed.authors) == len(changed)


def test_replacement_text_has_its_own_author_or_the_replaced_one() -> None:
    assert numbered("abc").replace("b", "xy").authors == "\1\2\2\3"
    assert numbered("abc").replace("b", Traced("xy", "99")).authors == "\1" + "99" + "\3"


def test_plain_text_is_the_templates() -> None:
    text = concat(["<", numbered("ab"), 1, ">"])
    assert (text, text.authors) == ("<ab1>", TEMPLATE + "\1\2" + TEMPLATE * 2)
    assert authors_of("ab") == TEMPLATE * 2


def test_nested_values_are_traced_and_their_first_author_found() -> None:
    value = traced({"a": [1, {"b": "c"}]}, "\5")
    assert value == {"a": [1, {"b": "c"}]}
    assert {type(key) for key in value} == {Traced} == {type(value["a"][1]["b"])}
    assert first_author([1, "plain", {}, value]) == "\5"
    assert first_author([1, "plain", {"a": None}]) is None
    with pytest.raises(TypeError):
        numbered("a") + 1  # type: ignore[operator]
