"""A byte-level BPE tokenizer: loads, encodes and decodes text, and conversations by their chat template.

Text and structure never mix. What a user writes is encoded as plain text, even where it spells `<|end|>`. The ids of
special tokens come only from the chat template, and from the code that puts documents into shards.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tokenizers

from moe_lm.common import hub
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import whole_file
from moe_lm.tokenizer.chat.template import ChatTemplate, Message
from moe_lm.tokenizer.chat.turns import ChatFormat
from moe_lm.tokenizer.files import check_ids, read_backend, read_config, rust_errors

# `tokenizers` needs about 100 bytes a character while it encodes, so long texts are encoded in pieces. A piece ends
# where the splits of GPT-2, of GPT-4 and ours all begin a new pre-token in any context, so the ids stay the same. Where
# there is no such place for half a piece, as in digits or Chinese without line ends, a few ids may differ there.
PIECE_CHARS = 1 << 16
PIECES_AT_ONCE = 64
SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
HALF_PAIR = "the text holds half of a surrogate pair; expected valid Unicode"

NAME_MARK, NAME_END = "\ufdd1", "\ufdd0"  # Unicode noncharacters, around the names of special tokens in a copy


class _Renamed(NamedTuple):
    """A tokenizer whose special tokens have names that no text holds; added tokens may have other ids in it."""

    backend: tokenizers.Tokenizer
    names: Mapping[int, str]  # of the special tokens, by their ids
    ids: Mapping[int, int]  # of all added tokens, by the ids that they have in `backend`
    special: frozenset[int]  # ids in `backend`

    def encode(self, text: str) -> tokenizers.Encoding:
        with rust_errors(_cannot_encode):
            return self.backend.encode(text, add_special_tokens=False)
        raise AssertionError  # never reached: the block returns or raises

    def own_ids(self, encoding: tokenizers.Encoding) -> list[int]:
        return [self.ids.get(id_, id_) for id_ in encoding.ids]


class Tokenizer:
    """A `tokenizers.Tokenizer` that never reads special tokens from text, with a chat template.

    `config` is the content of `tokenizer_config.json`: the names of the bos, eos and pad tokens and the chat template.
    Raises UsageError when `backend` has no token that ends a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = dict(config)
        self.eos_id = self._special_id("eos_token")
        self.bos_id = self._special_id("bos_token", self.eos_id)
        self.pad_id = self._special_id("pad_token", self.eos_id)

    @classmethod
    def load(cls, path: Path, vocab_size: int | None = None) -> Self:
        """Read a folder with `tokenizer.json`, or GPT-2's vocabulary and merges; or that of a name of the hub.

        Raises UsageError for a broken one, for one with more ids than a model of `vocab_size` has embeddings, and as
        `hub.local_folder`.
        """
        path = hub.local_folder(path, hub.TOKENIZER_FILES, enough="tokenizer.json")
        tokenizer = cls(read_backend(path, vocab_size), read_config(path))
        check_ids(tokenizer.vocab_size, vocab_size, path)  # the library may number added tokens anew
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle through the constructor: a pickled backend forgets that special tokens in text are plain text."""
        return type(self), (self._backend, self._config)

    def save(self, path: Path) -> None:
        """Write `files()` into a folder, each file whole or not at all."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, content in self.files().items():
                with whole_file(path / name) as file:
                    file.write_text(content, encoding="utf-8")
        except OSError as error:
            raise MoeLmError(f"cannot write the tokenizer to {path}: {error.strerror}") from error

    def files(self) -> dict[str, str]:
        """The content of each file of a saved tokenizer, by name; `transformers.AutoTokenizer` loads them."""
        return {
            "tokenizer_config.json": json.dumps(self._config, indent=2, ensure_ascii=False) + "\n",
            "tokenizer.json": self._backend.to_str(pretty=True) + "\n",
        }

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows that an embedding needs."""
        return 1 + max(self._backend.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of `tokenizer.json` in canonical form: equal exactly when all ids mean the same."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that plain text never gives, with their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them special."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores. Raises UsageError for a text that is not valid Unicode."""
        batch: list[list[int]] = [[] for _ in texts]
        pieces = ((row, piece) for row, text in enumerate(texts) for piece in split_text(text))
        while group := list(islice(pieces, PIECES_AT_ONCE)):
            with rust_errors(_cannot_encode):
                encoded = self._backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (row, piece), encoding in zip(group, encoded, strict=True):
                ids = encoding.ids
                if self._spelled and not self._spelled.isdisjoint(ids):
                    ids = self._renamed.own_ids(self._renamed.encode(piece))
                batch[row].extend(ids)
        return batch

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The conversation as the template writes it, for people to read. Raises UsageError when it cannot."""
        return self.chat_format.template.render(messages, tools, add_generation_prompt).text

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and the loss mask: for each id, whether it is trained on.

        Trained on are the assistant's turns, including tool calls and the token that ends a turn, without messages that
        have `train: False`. Only the template's own text gives special tokens, never the text of a message. Raises
        UsageError as `render_chat` does.
        """
        text, _, trained, specials = self.chat_format.render(messages, tools, add_generation_prompt)
        # The template's special tokens get names that no text can hold; everything else is tokenized as it is.
        pieces, flags, done = list[str](), list[np.ndarray[Any, Any]](), 0
        for begin, end in specials:
            name = self._renamed.names[self.special_tokens[text[begin:end]]]
            pieces += [text[done:begin], name]
            flags += [trained[done:begin], np.full(len(name), trained[begin])]
            done = end
        encoding = self._renamed.encode("".join([*pieces, text[done:]]))
        if sum(id_ in self._renamed.special for id_ in encoding.ids) != len(specials):
            raise UsageError(
                "the tokenizer does not read every special token that its chat template writes; expected special "
                "tokens without single_word, and a normalizer that leaves U+FDD0 and U+FDD1 alone"
            )
        # A token is trained on when one of its characters is.
        trained_before = np.cumsum(np.concatenate([[False], *flags, trained[done:]]))
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        loss_mask: list[bool] = (trained_before[ends] > trained_before[begins]).tolist()
        return self._renamed.own_ids(encoding), loss_mask

    @property
    def has_chat_template(self) -> bool:
        return bool(self._config.get("chat_template"))

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant's answer under the chat template; eos when there is no template."""
        return self.special_tokens[self.chat_format.end] if self.has_chat_template else self.eos_id

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens after which an answer or a tool call is complete: eos, and those of the chat template."""
        try:
            ends = self.chat_format.ends
        except UsageError:  # text can be sampled without a template, or with one that fails
            ends = set()
        return frozenset({self.eos_id, *(self.special_tokens[token] for token in ends)})

    @cached_property
    def chat_format(self) -> ChatFormat:
        """The compiled chat template. Raises UsageError when the tokenizer has none, or one that is not a template."""
        source = self._config.get("chat_template")
        if not isinstance(source, str | list):
            raise UsageError("this tokenizer has no chat template; add chat_template.jinja to its folder")
        contents = {name: _content(token) for name, token in self._config.items() if name.endswith("_token")}
        names = {name: content for name, content in contents.items() if content is not None}
        eos_token = self._backend.id_to_token(self.eos_id) or ""
        return ChatFormat(ChatTemplate(source, names), self.special_tokens, eos_token)

    @cached_property
    def _renamed(self) -> _Renamed:
        """The same tokenizer with names for its special tokens that nobody can guess, and so no text spells.

        `tokenizers` numbers added tokens anew when it reads them: one whose name is in the model's vocabulary has its
        id from there, any other the next free one. So a new name may move every added token, special or not.
        """
        mark = f"{NAME_MARK}{secrets.randbits(64)}{NAME_MARK}"
        content = json.loads(self._backend.to_str())
        content["post_processor"] = None
        names = {id_: f"{mark}{id_}{NAME_END}" for id_ in self.special_tokens.values()}
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a place is an id
            for id_ in self._spelled:
                vocabulary[id_][0] = names[id_]
        else:
            vocabulary = {names[id_] if id_ in self._spelled else word: id_ for word, id_ in vocabulary.items()}
            content["model"]["vocab"] = vocabulary | {f"{mark}hole{id_}{NAME_END}": id_ for id_ in _holes(vocabulary)}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["id"], token["content"])
        with rust_errors(lambda error: UsageError(f"the tokenizer takes no other special tokens: {error}")):
            backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        new_ids = backend.get_vocab(with_added_tokens=True)
        ids = {new_ids[token["content"]]: token["id"] for token in content["added_tokens"]}
        return _Renamed(backend, names, ids, frozenset(new_ids[name] for name in names.values()))

    @cached_property
    def _spelled(self) -> frozenset[int]:
        """The special tokens that the model itself would give for a text that spells them; not the one for the unknown.

        BPE gives none, as it puts together what its merges make. Unigram and word models look up any text.
        """
        if isinstance(self._backend.model, tokenizers.models.BPE):
            return frozenset()
        described = json.loads(self._backend.to_str())["model"]
        unknown = self._backend.token_to_id(described.get("unk_token") or "")
        known = self._backend.get_vocab(with_added_tokens=False)
        special = {known[token] for token in self.special_tokens if token in known}
        return frozenset(special - {unknown, described.get("unk_id")})

    def _special_id(self, name: str, otherwise: int | None = None) -> int:
        """The id of the token that the config calls `name`, else of GPT-2's only special token, else `otherwise`."""
        content = _content(self._config.get(name))
        with rust_errors(lambda error: UsageError(f"tokenizer_config.json: {name}={content!r} is no text: {error}")):
            found: int | None = self._backend.token_to_id(content or "<|endoftext|>")
        if found is None and not content:
            found = otherwise
        if found is None:
            raise UsageError(
                f"the tokenizer has no {name} {content or '<|endoftext|>'!r}; correct tokenizer_config.json"
            )
        return found


def split_text(text: str) -> Iterator[str]:
    """Cut a long text into pieces of at most PIECE_CHARS whose ids, joined, are those of the text.

    The exception is a run of half PIECE_CHARS without a space or a line end, which is cut anywhere.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        safe = SAFE_CUT.search(text, start + PIECE_CHARS // 2, start + PIECE_CHARS)
        stop = safe.start() if safe else start + PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _holes(vocabulary: Mapping[str, int]) -> set[int]:
    """The ids that a vocabulary leaves out; without a name each could become the id of an added token too.

    Raises UsageError when there are too many to name.
    """
    end = max(vocabulary.values(), default=-1) + 1
    if end > 2 * len(vocabulary) + 1000:
        raise UsageError(f"the tokenizer's vocabulary has {len(vocabulary)} entries for {end} ids; train it again")
    return set(range(end)) - set(vocabulary.values())


def _cannot_encode(error: BaseException) -> UsageError:
    return UsageError(HALF_PAIR if isinstance(error, TypeError) else f"the tokenizer cannot encode the text: {error}")


def _content(token: Any) -> str | None:
    """The text of a special token, which `tokenizer_config.json` may hold as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
