"""The tokenizer: GPT-2's vectors, round trips, training, files, and what bad input gets."""

from __future__ import annotations

import json
import pickle
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import SourceConfig, TokenizerRecipe
from moe_lm.config.reading import load_config
from moe_lm.text.sources import Report
from moe_lm.tokenizer.tokenizer import PIECE_CHARS, SAFE_CUT, Tokenizer, split_text
from moe_lm.tokenizer.training import PRE_TOKENS, SPECIAL_TOKENS, inspect, train_tokenizer

STAGE = Path(__file__).parents[2] / "tokenizer"
TEMPLATE = STAGE / "chat_template.jinja"
BOS, EOS, PAD, END = 0, 1, 2, 6
CL100K = (  # as in tiktoken
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = "The naïve café's owner can't count: 1, 22, 333, 4444, 55555.\n\n\tHe'd say “six”  —   twice. \n"
CHINESE = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？\n用Python写第12345行。\n"


def recipe(path: Path, **values: Any) -> TokenizerRecipe:
    source = SourceConfig(name="text", path=str(path), max_bytes=values.pop("max_bytes", None))
    return TokenizerRecipe(output=path, sources=(source,), **{"vocab_size": 400, **values})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "code.py").write_bytes(Path(__file__).read_bytes())
    (folder / "text.txt").write_text(PROSE * 3 + CHINESE * 3, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "vectors" / "gpt2")


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    vocabulary: dict[str, int] = json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
    return vocabulary


# Encoding


def test_gpt2_files_give_all_cases(gpt2: Tokenizer, shared_data: Path) -> None:
    folder = shared_data / "vectors" / "gpt2"
    texts = (folder / "cases.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(id_) for id_ in line.split()] for line in (folder / "cases.out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    assert gpt2.encode_batch(texts) == expected
    assert [gpt2.decode(ids) for ids in expected] == texts


def test_gpt2_begins_ends_and_pads_with_its_only_special_token(gpt2: Tokenizer) -> None:
    assert gpt2.bos_id == gpt2.eos_id == gpt2.pad_id == gpt2.end_id == 50256
    assert gpt2.vocab_size == 50257
    with pytest.raises(UsageError, match="no chat template"):
        gpt2.encode_chat([{"role": "user", "content": "x"}])


def test_gpt2_saved_in_our_form_is_the_same_tokenizer(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == gpt2.fingerprint
    assert again.encode(PROSE + CHINESE) == gpt2.encode(PROSE + CHINESE)
    assert again.eos_id == gpt2.eos_id


@given(st.text())
def test_any_text_round_trips(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids, skip_special=False) == text
    assert tiny_tokenizer.encode_batch([text, "x", text]) == [ids, tiny_tokenizer.encode("x"), ids]


@given(st.binary())
def test_any_bytes_read_as_text_round_trip(tiny_tokenizer: Tokenizer, data: bytes) -> None:
    for text in (data.decode("latin-1"), data.decode("utf-8", "replace")):
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from(["<|", "|>", "end", "bos", "<|end|>", "<|bos|>", " ", "<|user|>x"])).map("".join))
def test_text_that_spells_a_special_token_stays_text(tiny_tokenizer: Tokenizer, text: str) -> None:
    for tokenizer in (tiny_tokenizer, pickle.loads(pickle.dumps(tiny_tokenizer))):  # as worker processes get it
        ids = tokenizer.encode(text)
        assert min(ids, default=END + 1) > END
        assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        tiny_tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("letter", ["a", " ", "\n", "=", "字"])
def test_a_million_times_one_letter_round_trips(tiny_tokenizer: Tokenizer, letter: str) -> None:
    text = letter * 1_000_000
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert len(set(ids)) < 20


@pytest.mark.parametrize("size", [0, 1, PIECE_CHARS, PIECE_CHARS + 1, 5 * PIECE_CHARS])
@pytest.mark.parametrize("unit", ["a", "word and word\n"])
def test_pieces_are_bounded_and_make_up_the_text(unit: str, size: int) -> None:
    text = (unit * size)[:size]
    pieces = list(split_text(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= PIECE_CHARS


@pytest.mark.parametrize("name", ["tiny_tokenizer", "gpt2"])
def test_cutting_a_text_does_not_change_its_ids(name: str, corpus: Path, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for file in corpus.iterdir():
        text = file.read_text(encoding="utf-8")[:20_000]
        cuts = [match.start() for match in SAFE_CUT.finditer(text)]
        bounds = [0, *cuts, len(text)]
        pieces = [text[start:stop] for start, stop in pairwise(bounds)]
        assert cuts
        assert [id_ for ids in tokenizer.encode_batch(pieces) for id_ in ids] == tokenizer.encode(text)


def test_pre_tokens_are_gpt4s_where_no_run_is_absurdly_long(corpus: Path) -> None:
    ours, gpt4 = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (PRE_TOKENS, CL100K))
    for file in corpus.iterdir():
        text = file.read_text(encoding="utf-8")
        assert ours.pre_tokenize_str(text) == gpt4.pre_tokenize_str(text)


# Training


def test_special_tokens_come_first_then_bytes_then_merges(corpus: Path) -> None:
    tokenizer = train_tokenizer(recipe(corpus))
    tokens = sorted(tokens_of(tokenizer), key=tokens_of(tokenizer).__getitem__)
    assert tuple(tokens[:7]) == SPECIAL_TOKENS
    assert sorted(tokens[7:263]) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert all(len(token) > 1 for token in tokens[263:])
    assert tokenizer.vocab_size == len(tokens) == 400
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_id] == [BOS, EOS, PAD, END]


def test_no_token_is_longer_than_16_bytes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((" " * 40 + "字" * 40 + "\n") * 50, encoding="utf-8")
    tokens = tokens_of(train_tokenizer(recipe(tmp_path)))
    assert max(len(token) for token in tokens if token not in SPECIAL_TOKENS) == 16


def test_digits_stand_in_groups_of_at_most_three(tiny_tokenizer: Tokenizer) -> None:
    numbers = [token for token in tokens_of(tiny_tokenizer) if any(character.isdigit() for character in token)]
    assert all(token.isdigit() and len(token) <= 3 for token in numbers if token.isascii())


def test_training_twice_gives_the_same_bytes(corpus: Path) -> None:
    first, second = (train_tokenizer(recipe(corpus)) for _ in range(2))
    assert first.files() == second.files()
    assert first.fingerprint == second.fingerprint


def test_training_survives_endless_runs(tmp_path: Path, corpus: Path) -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    (tmp_path / "runs.txt").write_text("a" * 1_000_000 + " " * 1_000_000 + letters)
    assert train_tokenizer(recipe(tmp_path)).vocab_size == 400


def test_training_goes_on_past_bad_documents_and_reports_them(tmp_path: Path) -> None:
    (tmp_path / "a-good.txt").write_text(PROSE, encoding="utf-8")
    (tmp_path / "b-empty.txt").write_text("")
    (tmp_path / "c-latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "d-nul.txt").write_bytes(b"x\0y\n")
    reports: list[Report] = []
    tokenizer = train_tokenizer(recipe(tmp_path), reports.append)
    assert reports[-1].documents == 1
    assert reports[-1].text_bytes == len(PROSE.encode())
    assert sum(reports[-1].skipped.values()) == 3
    assert tokenizer.decode(tokenizer.encode(PROSE)) == PROSE


def test_training_stops_reading_at_max_bytes(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 1000)
    reports: list[Report] = []
    train_tokenizer(recipe(tmp_path, max_bytes=2500), reports.append)
    assert reports[-1].documents == 3


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="no usable document"):
        train_tokenizer(recipe(tmp_path))


@pytest.mark.parametrize("name", ["quickstart-4k", "english-32k", "english-chinese-code-64k"])
def test_recipes_are_valid(name: str) -> None:
    settings = load_config(TokenizerRecipe, STAGE / f"{name}.yaml")
    assert settings.vocab_size == 1024 * int(name.split("-")[-1].removesuffix("k"))
    assert all(source.stdlib or source.max_bytes for source in settings.sources)


def test_inspect_can_measure_a_sample(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All is read and counted, a tenth of the documents is encoded, and at least one of each source."""
    rows = "".join(json.dumps({"text": f"Row number {number}. " * 5}) + "\n" for number in range(400))
    (tmp_path / "many.jsonl").write_text(rows)
    (tmp_path / "one.txt").write_text("Only one.")
    sources = [SourceConfig(name=name.split(".")[0], path=str(tmp_path / name)) for name in ("many.jsonl", "one.txt")]
    many, one = inspect(tiny_tokenizer, sources, share=0.1).sources
    assert many.read.documents == 400
    assert 0.05 < many.measured_bytes / many.read.text_bytes < 0.2
    assert one.measured_bytes == one.read.text_bytes == 9
    whole, _ = inspect(tiny_tokenizer, sources).sources
    assert many.bytes_per_token == pytest.approx(whole.bytes_per_token, rel=0.05)
    assert f"bytes, in a sample of {many.measured_bytes:,}: " in str(inspect(tiny_tokenizer, sources, share=0.1))
    assert "in a sample" not in str(inspect(tiny_tokenizer, sources))


def test_inspect_measures_each_source(tiny_tokenizer: Tokenizer, corpus: Path) -> None:
    sources = [SourceConfig(name=file.stem, path=str(file)) for file in sorted(corpus.iterdir())]
    measure = inspect(tiny_tokenizer, sources, longest=3)
    assert [source.name for source in measure.sources] == ["code", "text"]
    for source, file in zip(measure.sources, sorted(corpus.iterdir()), strict=True):
        text = file.read_text(encoding="utf-8")
        ids = tiny_tokenizer.encode(text)
        assert (source.read.documents, source.tokens, source.round_trip_failures) == (1, len(ids), 0)
        assert source.bytes_per_token == len(text.encode()) / len(ids)
    assert measure.longest_tokens[:2] == (" " * 16, "-" * 16)
    assert len(measure.longest_tokens) == 3
    assert 0 < measure.unused_ids < 1024 - 7
    assert measure.fingerprint == tiny_tokenizer.fingerprint


def test_inspect_counts_documents_that_do_not_come_back(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))  # knows one letter and no bytes
    (tmp_path / "0.txt").write_text("aaa")
    (tmp_path / "1.txt").write_text("aba")
    backend.decoder = tokenizers.decoders.Fuse()
    measure = inspect(Tokenizer(backend, {}), [SourceConfig(name="text", path=str(tmp_path))])
    assert measure.sources[0].round_trip_failures == 1


# Files


def test_saving_and_loading_keeps_everything(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert again.files() == tiny_tokenizer.files()
    assert again.fingerprint == tiny_tokenizer.fingerprint
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(again.files())


def test_the_fingerprint_sees_one_changed_merge(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tiny_tokenizer.files()["tokenizer.json"])
    content["model"]["merges"][-2:] = content["model"]["merges"][:-3:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(tiny_tokenizer.files()["tokenizer_config.json"])
    assert Tokenizer.load(tmp_path).fingerprint != tiny_tokenizer.fingerprint


def test_the_artefact_carries_the_packaged_template(tiny_tokenizer: Tokenizer) -> None:
    config = json.loads(tiny_tokenizer.files()["tokenizer_config.json"])
    assert config["chat_template"] == TEMPLATE.read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in (STAGE / "tiny").iterdir()) < 200_000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no tokenizer; expected tokenizer\.json, or vocab\.json and merges\.txt$"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json is broken"),
        ({"tokenizer.json": None, "tokenizer_config.json": "["}, r"tokenizer_config\.json is broken"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[1]"}, r"tokenizer_config\.json is broken"),
        ({"tokenizer.json": None}, r"no eos_token '<\|endoftext\|>'"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "</s>"}'}, "no eos_token '</s>'"),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"},
            r"vocab\.json is broken: .*out of vocabulary",
        ),
        ({"vocab.json": "nonsense", "merges.txt": ""}, r"vocab\.json is broken"),
        ({"vocab.json": '{"a": 4000000000}', "merges.txt": ""}, r"vocab\.json is broken: its ids end at 4000000000"),
        ({"tokenizer.json": '{"added_tokens": 3}'}, r"tokenizer\.json is broken: added_tokens=3, expected a list"),
        (
            {"tokenizer.json": '{"model": {"continuing_subword_prefix": "####", "merges": [["a", "b"]]}}'},
            r"tokenizer\.json is broken: the merge \['a', 'b'\] does not go on with the prefix '####'",
        ),
        ({"tokenizer.json": '{"model": {"vocab": 3}}'}, r"tokenizer\.json is broken: its vocabulary is 3, expected"),
        ({"tokenizer.json": "[" * 100_000}, r"tokenizer\.json is broken: maximum recursion depth exceeded"),
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "\\ud800"}'},
            r"eos_token='\\ud800' is no text",
        ),
    ],
)
def test_a_broken_folder_is_refused(
    tiny_tokenizer: Tokenizer, tmp_path: Path, files: dict[str, str | None], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(tiny_tokenizer.files()[name] if content is None else content)
    with pytest.raises(UsageError, match=message):
        Tokenizer.load(tmp_path)


def test_a_text_that_a_vocabulary_cannot_express_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="gone"))
    with pytest.raises(UsageError, match="the tokenizer cannot encode the text"):
        Tokenizer(backend, {}).encode("b")


def test_saving_where_a_file_stands_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(MoeLmError, match="taken"):
        tiny_tokenizer.save(tmp_path / "taken")
