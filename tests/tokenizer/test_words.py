from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.tokenizer import words as module
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tokenizer.words import UNSURE, Words

TEXTS = [
    "It's the fox's den; they'LL, we'd\u2019s 12345 4\u00bd .\r\n\r\n  \tx   y \n",
    "a  b   c\u3000\u6771\u4eac\u30bf\u30ef\u30fc 2026\u5e74, na\u00efve caf\u00e9\u00a0\u2014 <|end|> <|bos|>",
    "'\u017f and \u212a, \x1c\x85\u2028 \U0001f600, \u0661\u0662",  # what the two packages may see otherwise
    "",
    " ",
    "w" * 300 + " " * 300 + "\n" * 300 + "!" * 300,
]


def ids(encoded: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(item, "<u2").tolist() for item in encoded]


@pytest.fixture(scope="module")
def words(tiny_tokenizer: Tokenizer) -> Words:
    return Words(tiny_tokenizer, "<u2")


@pytest.fixture(autouse=True)
def _always_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEW_IN", 0)


def test_the_table_gives_the_ids_of_the_tokenizer(words: Words, tiny_tokenizer: Tokenizer) -> None:
    assert words.is_fast
    assert ids(words.encode(TEXTS * 2)) == tiny_tokenizer.encode_batch(TEXTS * 2)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=40), max_size=4))
def test_any_text_has_the_ids_of_the_tokenizer(words: Words, tiny_tokenizer: Tokenizer, texts: list[str]) -> None:
    assert ids(words.encode(texts)) == tiny_tokenizer.encode_batch(texts)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=" \t\r\n'sStT.,!1aé\u00a1\u6771\u3000ſ\u2014", max_size=60))
def test_spaces_marks_and_letters_in_any_order_are_divided_as_the_tokenizer_does(
    words: Words, tiny_tokenizer: Tokenizer, text: str
) -> None:
    assert ids(words.encode([text])) == tiny_tokenizer.encode_batch([text])


def test_a_table_that_is_full_begins_anew(
    words: Words, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    for _ in range(2):
        assert ids(words.encode(TEXTS)) == tiny_tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize("added", [[], ["fox"]])
def test_gpt2s_own_form_is_fast_unless_words_are_added(shared_data: Path, added: list[str]) -> None:
    folder = shared_data / "vectors" / "gpt2"
    model = tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_tokens(added)
    tokenizer = Tokenizer(backend, {})
    words = Words(tokenizer, "<u2")
    assert words.is_fast == (not added)
    assert ids(words.encode(TEXTS)) == tokenizer.encode_batch(TEXTS)


def test_a_pattern_that_leaves_text_out_or_sees_it_otherwise_is_not_used(tiny_tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer.files()["tokenizer.json"])
    for pattern, is_fast in (("[a-m]+|[^a]", True), (r"(\p{L})+", False), (r"\h+", False)):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
        tokenizer = Tokenizer(backend, {"eos_token": "<|eos|>", "bos_token": "<|bos|>"})
        words = Words(tokenizer, "<u2")
        assert words.is_fast == is_fast, pattern
        assert ids(words.encode(TEXTS)) == tokenizer.encode_batch(TEXTS)


def test_the_characters_that_are_sure_are_many_and_leave_out_the_rare() -> None:
    assert not UNSURE.search("Das „Übel“, ‘quoted’ – 東京タワー。ПРИВЕТ\n")
    assert all(UNSURE.match(rare) for rare in "\x00\x1c\x85\u00a0\u017f\u2028\u212a\U0001f600")
