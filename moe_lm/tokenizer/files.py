"""The files of a tokenizer, which may come from a stranger: what would take long or much is refused before it does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_lm.common.errors import UsageError
from moe_lm.common.files import open_regular, read_regular

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
MOST_BYTES = {"tokenizer.json": 256 << 20, "tokenizer_config.json": 64 << 20, "chat_template.jinja": 1 << 20}
MOST_IDS = 1 << 24
MOST_ADDED = 1 << 17  # `tokenizers` takes 8 KB for each added token


def read_backend(folder: Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """The tokenizer in `tokenizer.json`, or in GPT-2's vocabulary and merges.

    Raises UsageError for a folder without either, for a broken file, and for more ids than a model of `vocab_size` has
    embeddings.
    """
    file = folder / "tokenizer.json"
    if _is_there(file):
        text = _read(file)
        content = _object(text, file)
        check_ids(_count_ids(content, file), vocab_size, folder)
        _check_merges(content, file)
        return _built(file, tokenizers.Tokenizer.from_str, text)
    for names in GPT2_FILES:
        vocabulary, merges = (folder / name for name in names)
        if _is_there(vocabulary) and _is_there(merges):
            ids = _count_ids({"model": {"vocab": _object(_read(vocabulary), vocabulary)}}, vocabulary)
            check_ids(ids, vocab_size, folder)
            open_regular(merges, MOST_BYTES["tokenizer.json"]).close()
            return _built(vocabulary, _gpt2_backend, vocabulary, merges)
    cure = "" if folder.is_dir() else "; moe-lm tokenizer train RECIPE makes one (moe-lm init TEXT writes a recipe)"
    raise UsageError(f"{folder} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt{cure}")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, with the chat template that newer programs write to a separate file."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _object(_read(file), file) if _is_there(file) else {}
    if _is_there(template):
        config["chat_template"] = _read(template)
    return config


def check_ids(ids: int, vocab_size: int | None, folder: Path) -> None:
    """Raise UsageError when a model of `vocab_size` has too few embeddings for a tokenizer of so many ids."""
    if vocab_size is not None and ids > vocab_size:
        raise UsageError(
            f"the tokenizer in {folder} has {ids} ids, but the model embeddings for only {vocab_size}; give the "
            "tokenizer that it was trained with (--tokenizer)"
        )


def _count_ids(content: dict[str, Any], file: Path) -> int:
    """The number of ids in a tokenizer.json; raises UsageError for so many that reading it would take gigabytes."""
    added, model = content.get("added_tokens") or [], content.get("model")
    vocabulary = (model.get("vocab") or {}) if isinstance(model, dict) else {}
    if not isinstance(added, list):
        raise _broken(file, f"added_tokens={added!r:.40}, expected a list")
    if not isinstance(vocabulary, dict | list):
        raise _broken(file, f"its vocabulary is {vocabulary!r:.40}, expected an object or a list")
    if len(added) > MOST_ADDED:
        raise _broken(file, f"it has {len(added)} added tokens, expected at most {MOST_ADDED}")
    ids = [token.get("id") for token in added if isinstance(token, dict)]
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    count = max((id_ + 1 for id_ in ids if isinstance(id_, int)), default=0)
    if count > MOST_IDS:
        raise _broken(file, f"its ids end at {count - 1}, expected at most {MOST_IDS} ids")
    return max(count, len(vocabulary))


def _check_merges(content: dict[str, Any], file: Path) -> None:
    """Raise UsageError for a merge whose second part lacks the prefix of such parts, where Rust may panic."""
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and pair and not str(pair[-1]).startswith(prefix):
            raise _broken(file, f"the merge {merge!r:.60} does not go on with the prefix {prefix!r:.20}")


def _gpt2_backend(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _is_there(file: Path) -> bool:
    return os.path.lexists(file)


def _read(file: Path) -> str:
    content = read_regular(file, MOST_BYTES.get(file.name, MOST_BYTES["tokenizer.json"]))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _broken(file, error) from error


def _object(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(file, error) from error
    if not isinstance(content, dict):
        raise _broken(file, f"it holds {type(content).__name__}, expected a JSON object")
    return content


def _built(file: Path, build: Callable[..., tokenizers.Tokenizer], *arguments: Any) -> tokenizers.Tokenizer:
    with rust_errors(lambda error: _broken(file, error)):
        return build(*arguments)
    raise AssertionError  # never reached: the block returns or raises


@contextmanager
def rust_errors(told: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Raise `told(error)` for what `tokenizers` raises, plain Exceptions and, for a panic, no Exception at all."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise told(error) from error


def _broken(file: Path, why: object) -> UsageError:
    return UsageError(f"{file} is broken: {why}; copy or train the tokenizer again")
