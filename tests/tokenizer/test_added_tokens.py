"""Added tokens keep their ids in conversations: `transformers` gives the same ids and masks for each kind of tokenizer.

Each kind is this project's small vocabulary with special tokens and other added tokens where a published one has them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "tokenizer" / "tiny" / "tokenizer.json"
NFC = {"type": "NFC"}
# What SentencePiece does as a normalizer: one prefix, and spaces as ▁.
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@dataclass(frozen=True)
class Kind:
    """Where a tokenizer has its added tokens, and how its template writes a turn."""

    first: tuple[str, ...] = ()  # special tokens in the model's vocabulary, before all others
    last: tuple[str, ...] = ()  # special tokens in the model's vocabulary, after all others
    special: tuple[str, ...] = ()  # special tokens behind the vocabulary
    plain: tuple[str, ...] = ()  # added tokens behind those, not special
    user: str = "<|user|>\n"
    assistant: str = "<|assistant|>\n"
    end: str = "<|endoftext|>"
    bos: str | None = None
    normalizer: dict[str, Any] | None = None
    special_flags: tuple[str, ...] = ()
    plain_flags: tuple[str, ...] = ("normalized",)
    declared: tuple[str, ...] = ()  # ordinary entries of the vocabulary that are declared special
    leave_out: int = 0  # ids without an entry, before the last ordinary one


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SPACES = tuple(" " * count for count in range(24, 1, -1))
TABS = tuple("\t" * count for count in range(9, 1, -1))
KINDS = {
    "deepseek_v3": Kind(
        first=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        special=("<｜place▁holder▁no▁0｜>", "<｜place▁holder▁no▁1｜>"),
        plain=("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>"),
        user="<｜User｜>", assistant="<｜Assistant｜>", end="<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
        plain_flags=(),
    ),
    "gpt_neox": Kind(first=("<|endoftext|>", "<|padding|>"), plain=SPACES, normalizer=NFC),
    "phi_2": Kind(last=("<|endoftext|>",), plain=SPACES + TABS),
    "qwen3": Kind(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        user="<|im_start|>user\n", assistant="<|im_start|>assistant\n", end="<|im_end|>", normalizer=NFC,
        plain_flags=(),
    ),
    "llama_2": Kind(
        first=("<unk>", "<s>", "</s>"), plain=("<think>", "</think>"), user="[INST] ", assistant=" [/INST]",
        end="</s>", bos="<s>", normalizer=PREPEND, plain_flags=(),
    ),
    "normalized specials": Kind(
        first=("<s>", "</s>"), special=("<|user|>", "<|assistant|>"), plain=SPACES, end="</s>", bos="<s>",
        normalizer=NFC, special_flags=("normalized",),
    ),
    "phi_3": Kind(
        first=("<unk>", "<s>", "</s>"), special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        plain=("<think>",), end="<|end|>", special_flags=("rstrip",), plain_flags=("rstrip",),
    ),
    "stripped on the left": Kind(
        first=("<pad>", "<|endoftext|>"), plain=("<think>", "</think>"), special_flags=("lstrip",),
        plain_flags=("lstrip", "normalized"),
    ),
    "an ordinary token for padding": Kind(special=("<|endoftext|>",), plain=SPACES, declared=("import",)),
    "a vocabulary with holes": Kind(first=("<|endoftext|>", "<|padding|>"), plain=SPACES[-3:], leave_out=2),
}  # fmt: skip


def save(kind: Kind, folder: Path, generation: bool = False) -> Path:
    """A folder as others save it. With `generation` the template marks what is trained on."""
    content = json.loads(TINY.read_text(encoding="utf-8"))
    model = content["model"]
    ours = {token["content"] for token in content["added_tokens"]}
    words = [word for word in sorted(model["vocab"], key=model["vocab"].__getitem__) if word not in ours]
    if "Prepend" in str(kind.normalizer):
        content["pre_tokenizer"] = content["decoder"] = None
        words += [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
        model["byte_fallback"] = True
    words = [*kind.first, *words, *kind.last]
    model["vocab"] = {word: place for place, word in enumerate(words)}
    model["vocab"][words[-1]] += kind.leave_out
    added: list[dict[str, Any]] = []
    for token in (*kind.first, *kind.last, *kind.declared, *kind.special, *kind.plain):
        flags = kind.plain_flags if token in kind.plain else kind.special_flags
        entry = {name: name in flags for name in ("single_word", "lstrip", "rstrip", "normalized")}
        place = model["vocab"].get(token, len(model["vocab"]) + len(added))
        added.append({"id": place, "content": token, "special": token not in kind.plain, **entry})
    added.sort(key=lambda token: int(token["id"]))
    content |= {"added_tokens": added, "post_processor": None, "normalizer": kind.normalizer}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": kind.end, "bos_token": kind.bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    begin, end = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    (folder / "chat_template.jinja").write_text(
        "{{- bos_token if bos_token is defined and bos_token }}{% for message in messages %}"
        f"{{% if message.role == 'user' %}}{{{{ {kind.user!r} + message.content }}}}{{% else %}}"
        f"{{{{ {kind.assistant!r} }}}}{begin}{{{{ message.content + {kind.end!r} }}}}{end}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {kind.assistant!r} }}}}{{% endif %}}",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer of each kind, and that of `transformers`, whose template marks what is trained on."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    root = tmp_path_factory.mktemp("kinds")
    return {
        name: (
            Tokenizer.load(save(kind, root / name / "ours")),
            transformers.AutoTokenizer.from_pretrained(save(kind, root / name / "theirs", generation=True)),
        )
        for name, kind in KINDS.items()
    }


def said(pieces: Sequence[str]) -> st.SearchStrategy[str]:
    """Words, code with its indentation, and every added token that is not special."""
    words = [
        "word",
        " and",
        "\n",
        "\n\n",
        "  ",
        "    ",
        "\t",
        "\t\t",
        "12345",
        "é",
        "e\u0301",
        "中文",
        "!",
        "ing",
        "<",
        "▁",
    ]
    code = ["def f(x):\n        return x  # 1 < 2\n", "for i in j:\n    if i:\n            k\n"]
    return st.lists(st.one_of(st.sampled_from([*words, *code, *pieces]), st.text(max_size=5))).map("".join)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_and_masks_of_conversations_are_those_of_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, data: st.DataObject
) -> None:
    ours, theirs = pairs[name]
    contents = data.draw(st.lists(said(KINDS[name].plain), min_size=1, max_size=4))
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = ours.encode_chat(messages, add_generation_prompt=prompt)
        assert ids == expected["input_ids"], contents
        assert mask == [bool(trained) for trained in expected["assistant_masks"]], contents


@pytest.mark.parametrize("name", KINDS)
def test_every_added_token_keeps_its_id_in_a_conversation(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, theirs = pairs[name]
    for token in KINDS[name].plain:
        ids, _ = ours.encode_chat([{"role": "user", "content": f"a{token}b"}])
        assert theirs.added_tokens_encoder[token] in ids


@pytest.mark.parametrize(("flag", "normalizer"), [("single_word", None), ("normalized", PREPEND)])
def test_special_token_that_its_tokenizer_skips_is_refused(
    tmp_path: Path, flag: str, normalizer: dict[str, Any] | None
) -> None:
    """Neither is found behind a letter, and the name of neither must become text."""
    kind = Kind(special=("<|endoftext|>",), special_flags=(flag,), normalizer=normalizer)
    tokenizer = Tokenizer.load(save(kind, tmp_path / "words"))
    asked = {"role": "user", "content": "a"}
    tokenizer.encode_chat([asked, {"role": "assistant", "content": "b "}])
    with pytest.raises(UsageError, match="does not read every special token that its chat template writes"):
        tokenizer.encode_chat([asked, {"role": "assistant", "content": "b"}])


UNIGRAM = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *([letter, -5.0] for letter in "▁abcdefgh<>/s")]
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "u": 3, "a": 4, "b": 5}


@pytest.mark.parametrize(
    ("model", "splitter"),
    [
        ({"type": "Unigram", "unk_id": 0, "vocab": UNIGRAM}, pre_tokenizers.Metaspace()),
        ({"type": "WordLevel", "unk_token": "<unk>", "vocab": WORDS}, pre_tokenizers.WhitespaceSplit()),
    ],
)
def test_text_that_spells_a_special_token_stays_text_where_the_model_looks_it_up(
    model: dict[str, Any], splitter: Any
) -> None:
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    content |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = splitter
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(["ab"])
    plain = backend.token_to_id("ab")
    template = "{% for m in messages %}{{ m.role[:1] + ' ' + m.content + ' ' }}</s>{% endfor %}"
    tokenizer = Tokenizer(backend, {"eos_token": "</s>", "chat_template": template})
    assert backend.encode("a </s> b", add_special_tokens=False).ids.count(2) == 1  # what the library gives
    assert tokenizer.encode("a b ab") == backend.encode("a b ab", add_special_tokens=False).ids
    for text in ("a </s> b", "<s> ab </s>", "</s>"):
        assert {1, 2}.isdisjoint(tokenizer.encode(text))
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": f"b {text}"}]
        ids, mask = tokenizer.encode_chat(said)
        assert (ids.count(1), ids.count(2)) == (0, 2)
        assert mask[-1]
        assert ids.count(plain) == 2 * text.count("ab")
    assert tokenizer.encode("z")[-1] == 0  # the unknown


def test_names_of_special_tokens_cannot_be_guessed() -> None:
    """Those of a program that runs are other ones in each, so that no text can be written for them."""
    tokenizer = Tokenizer.load(TINY.parent)
    again = Tokenizer.load(TINY.parent)
    names, others = tokenizer._renamed.names, again._renamed.names
    assert names.keys() == others.keys() == set(tokenizer.special_tokens.values())
    assert set(names.values()).isdisjoint(others.values())
    asked = [{"role": "user", "content": "".join(others.values())}, {"role": "assistant", "content": "\ufdd1" * 9}]
    ids, _ = tokenizer.encode_chat(asked)
    assert [id_ for id_ in ids if id_ in names] == [id_ for id_ in tokenizer.encode_chat(SAID)[0] if id_ in names]
    assert tokenizer.encode_chat(asked) == tokenizer.encode_chat(asked)


def test_special_token_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    folder = save(KINDS["qwen3"], tmp_path / "words")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "\\ud800"}')
    with pytest.raises(UsageError, match=r"tokenizer_config.json: bos_token='\\ud800' is no text"):
        Tokenizer.load(folder)
