from pathlib import Path

import numpy as np
import pytest
import regex
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


def test_text_that_gains_nothing_is_not_divided_for_a_while(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, divided = Words(tiny_tokenizer, "<u2"), []
    divide = module._divided
    monkeypatch.setattr(module, "NEW_IN", 4)
    monkeypatch.setattr(module, "PLAIN_BATCHES", 3)
    monkeypatch.setattr(module, "_divided", lambda pattern, text: (divided.append(text), divide(pattern, text))[1])
    texts = ["\u6771\u4eac\u30bf\u30ef\u30fc " + chr(0x4E00 + number) for number in range(6)]
    for text in texts:
        assert ids(words.encode([text])) == tiny_tokenizer.encode_batch([text])
    assert divided == [texts[0], texts[4]]


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


def divided_by(expression: str) -> Tokenizer:
    """A tokenizer without merges but of digits, so that another division of these has other ids."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [("1", "2"), ("12", "3"), ("3", "4"), ("4", "5"), ("123", "45")]
    vocab = {token: number for number, token in enumerate([*letters, *(a + b for a, b in pairs), "<|end|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


@settings(max_examples=40, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from("\t\r\n '/.sStTlLvEA1½\u00e9\u6771\u3000\u2014"), st.integers(1, 9))))
def test_both_packages_divide_a_text_alike_by_the_expressions_of_the_table(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in runs)
    for expression in module.SEEN_ALIKE:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
        assert regex.findall(expression, text) == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("expression", sorted(module.SEEN_ALIKE))
def test_the_expressions_of_known_tokenizers_are_fast(expression: str) -> None:
    tokenizer = divided_by(expression)
    words = Words(tokenizer, "<u2")
    assert words.is_fast
    assert ids(words.encode(TEXTS)) == tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize("expression", [
    r"\p{N}{1,3}+|\p{L}+|[^\p{L}\p{N}]+",  # possessive in one package, repeated in the other
    r"^\s+|\S+|\s",  # the beginning of the text, or of a line
    "[^\n]+$|\\s+|\\S",
    "[a-m]+|[^a]",
    r"(\p{L})+",
    r"\h+",
])  # fmt: skip
def test_any_other_expression_is_left_to_the_tokenizer(expression: str) -> None:
    tokenizer = divided_by(expression)
    words = Words(tokenizer, "<u2")
    assert not words.is_fast
    assert ids(words.encode(TEXTS)) == tokenizer.encode_batch(TEXTS)


def test_the_characters_that_are_sure_are_many_and_leave_out_the_rare() -> None:
    assert not UNSURE.search("Das „Übel“, ‘quoted’ – 東京タワー。ПРИВЕТ\n")
    assert all(UNSURE.match(rare) for rare in "\x00\x1c\x85\u00a0\u017f\u2028\u212a\U0001f600")
