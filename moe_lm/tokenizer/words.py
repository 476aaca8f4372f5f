"""Text -> ids as bytes, through a table of the words that came before.

The regular expression of `tokenizers` takes half of its time, and a text has few different words. So the text is
divided by the same expression in the package `regex`, which is several times as fast, and the ids of a word are looked
up.
The two packages read some expressions otherwise (`{1,3}+` and `^` among them), and may know different versions of
Unicode. So the table serves the expressions named here. A text with a character that either might see otherwise, and
every text of a tokenizer of another kind, goes through `tokenizers` itself, so that the ids are always its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
import tokenizers

from moe_lm.tokenizer.tokenizer import Tokenizer, split_text
from moe_lm.tokenizer.training import PRE_TOKENS

MOST_WORDS = 1 << 18  # in the table, which is emptied then
MOST_CHARACTERS = 1 << 24  # of these words, the same
PLAIN_BATCHES = 31  # after one that gained nothing, so that looking for words costs such text a few percent at most
NEW_IN = 4  # of so many words one may be new: beyond that the table costs more than it saves
# Letters, digits, punctuation and spaces that all versions of Unicode in use see alike: Latin, Cyrillic, Chinese and
# Japanese without the long s (an s to some when case is ignored) and rare spaces.
SURE = (
    "\t\n\r -~\u00a1-\u017e\u0410-\u044f\u2010-\u2027\u2030-\u205e"
    "\u3001-\u3020\u3041-\u3096\u30a1-\u30fa\u30fc\u4e00-\u9fa5\uff01-\uff5e"
)
UNSURE = re.compile(f"[^{SURE}]")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
GPT4 = rf"{SHORT}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}"  # and of Llama 3
QWEN = GPT4.replace("{1,3}", "")
GPT4O = (
    rf"{BEFORE}{UPPER}*{LOWER}+{SHORT}?|{BEFORE}{UPPER}+{LOWER}*{SHORT}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
)
SEEN_ALIKE = frozenset({PRE_TOKENS, GPT2, GPT4, QWEN, GPT4O})  # by both packages: tests/tokenizer/test_words.py


class Words:
    """Encodes texts as `Tokenizer.encode_batch`, into the bytes of ids of a type."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._known: dict[str, bytes] = {}
        self._characters = 0  # of the words in the table
        self._plain_batches = 0  # that are still to be encoded without it
        self._by_table = _pattern_and_model(tokenizer)
        if self._by_table is not None and not self._agrees_on_every_character():
            self._by_table = None

    @property
    def is_fast(self) -> bool:
        """Whether this kind of tokenizer can be read from the table."""
        return self._by_table is not None

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, none of them special. Raises UsageError as `Tokenizer.encode_batch`."""
        self._plain_batches -= 1
        if self._by_table is None or self._plain_batches >= 0:
            return self._plainly(texts)
        pattern, model = self._by_table
        words = [None if UNSURE.search(text) else _divided(pattern, text) for text in texts]
        if len(self._known) > MOST_WORDS or self._characters > MOST_CHARACTERS:
            self._known.clear()
            self._characters = 0
        divided = [found for found in words if found is not None]
        new = list(set[str]().union(*divided).difference(self._known))
        if NEW_IN * len(new) > sum(map(len, divided)):  # as in Chinese, whose words here are half sentences
            self._plain_batches = PLAIN_BATCHES
            return self._plainly(texts)
        self._characters += sum(map(len, new))
        encoded = model.encode_batch_fast(new, add_special_tokens=False)
        known = self._known
        known.update((word, self._bytes(encoding.ids)) for word, encoding in zip(new, encoded, strict=True))
        plain = iter(self._plainly([text for text, found in zip(texts, words, strict=True) if found is None]))
        return [next(plain) if found is None else b"".join(map(known.__getitem__, found)) for found in words]

    def _plainly(self, texts: Sequence[str]) -> list[bytes]:
        return [self._bytes(ids) for ids in self._tokenizer.encode_batch(texts)] if texts else []

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, self._dtype).tobytes()

    def _agrees_on_every_character(self) -> bool:
        """Whether both packages divide a text that has every sure character before and behind others, and all of it."""
        assert self._by_table is not None
        codes = [*range(0x4E00), *range(0x4E00, 0x9FA6, 64), *range(0xFF00, 0x10000)]
        sure = [character for character in map(chr, codes) if not UNSURE.match(character)]
        probe = "".join(f"a{c}b 1{c}2 {c} .{c}! {c}{c}'{c}s\n" for c in sure)
        if _divided(self._by_table[0], probe) is None:
            return False
        return self.encode([probe, probe * NEW_IN]) == self._plainly([probe, probe * NEW_IN])


def _divided(pattern: Any, text: str) -> list[str] | None:
    """The words of a text; None if the pattern leaves a part of it out."""
    words: list[str] = []
    for piece in split_text(text):  # the same pieces as in `encode_batch`: few ids depend on them
        words += pattern.findall(piece)
    return words if sum(map(len, words)) == len(text) else None


def _pattern_and_model(tokenizer: Tokenizer) -> tuple[Any, tokenizers.Tokenizer] | None:
    """The expression that divides a text, and the model that encodes a word; None for another kind of tokenizer."""
    content = json.loads(tokenizer.files()["tokenizer.json"])
    own = all(token["special"] for token in content["added_tokens"])  # others are found in a text before words are
    if content["model"]["type"] != "BPE" or content["model"].get("dropout") or content["normalizer"] or not own:
        return None
    steps = content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            expression = GPT2
        case [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pass
        case _:
            return None
    if expression not in SEEN_ALIKE:
        return None
    content["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return regex.compile(expression), tokenizers.Tokenizer.from_str(json.dumps(content))
