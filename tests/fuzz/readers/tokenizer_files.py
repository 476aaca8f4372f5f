"""tokenizer.json, tokenizer_config.json and chat_template.jinja in one folder, used once they are read.

An input is one JSON object of the three, so that a mutation may change any of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes, mutate_json

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
CONFIG = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "model_max_length": 10**30,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}, "chat_template": TEMPLATE,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "one </s> two"}, {"role": "assistant", "content": "three"}]


def prepare(folder: Path) -> Read:
    def read(data: bytes) -> None:
        for file, content in zip(FILES, _parts(data), strict=True):
            (folder / file).unlink(missing_ok=True)
            if content:
                (folder / file).write_bytes(content)
        tokenizer = Tokenizer.load(folder, vocab_size=4096)
        tokenizer.decode(tokenizer.encode("ab </s> é\n"))
        tokenizer.encode_chat(MESSAGES)

    return read


def seeds() -> list[bytes]:
    found = []
    for model in (
        models.BPE({"a": 3, "b": 4, "ab": 5, " ": 6, "<s>": 0, "</s>": 1, "x": 2}, [("a", "b")]),
        models.Unigram(
            [("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("a", -2.0), ("x", -9.0)], unk_id=4, byte_fallback=False
        ),
        models.WordPiece({"<s>": 0, "</s>": 1, "x": 2, "a": 3, "##b": 4}, unk_token="x"),
        models.WordLevel({"<s>": 0, "</s>": 1, "x": 2, "a": 3}, unk_token="x"),
    ):
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("z", "a")])
        pieces = [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits()]
        backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        backend.add_special_tokens(["<s>", "</s>"])
        found.append(backend.to_str())
    return [_joined(json.loads(text), CONFIG, template) for text in found for template in (TEMPLATE, "")]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    parts = _parts(data)
    place = draw.choice((0, 0, 0, 1, 1, 2))
    change = mutate_bytes if place == 2 else mutate_json
    parts[place] = change(draw, parts[place], [_parts(seed)[place] for seed in seeds])
    return SEPARATOR.join(parts)


SEPARATOR = b"\n\0\0\n"


def _joined(tokenizer: object, config: object, template: str) -> bytes:
    return SEPARATOR.join([json.dumps(tokenizer).encode(), json.dumps(config).encode(), template.encode()])


def _parts(data: bytes) -> list[bytes]:
    return [*data.split(SEPARATOR, 2), b"", b""][:3]


# `tokenizers` takes 8 KB for an added token, whose JSON has some 40 bytes.
READER = Reader("tokenizer", prepare, seeds, mutate, memory_per_byte=256)
