"""Sources of token files that other programs wrote: indexed in place, trained on as they are, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from moe_lm.common.errors import UsageError
from moe_lm.config.data import DataConfig, Phase
from moe_lm.data.batches import EvaluationBatches, PackedBatches
from moe_lm.data.marks import Marks
from moe_lm.data.prepare import PrepareReport, prepare
from moe_lm.data.shards import Manifest, TokenShards
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.data import writers
from tests.data.test_batches import assert_same, make_shards

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"
VOCABULARY, EOS = 1024, 1
DOCUMENTS = [
    [*np.random.default_rng(number).integers(8, VOCABULARY, 3 + number % 40).tolist(), EOS] for number in range(60)
]


def config(path: Path, shards: Path, validation_fraction: float = 0.1, **settings: object) -> DataConfig:
    tokens = {"path": str(path)} | {name: settings.pop(name) for name in ("dtype", "validation") if name in settings}
    values = {"sources": [{"name": "web", "tokens": tokens}], "tokenizer": TOKENIZER, "shards": shards, "workers": 1}
    return DataConfig.model_validate(values | {"validation_fraction": validation_fraction} | settings)


def indexed(path: Path, shards: Path, **settings: object) -> tuple[Manifest, PrepareReport]:
    report = prepare(config(path, shards, **settings))
    return report.manifests["web"], report


@pytest.mark.parametrize("name", writers.WRITERS)
@pytest.mark.parametrize("separate", [True, False])
def test_batches_are_those_of_the_documents_themselves(name: str, separate: bool, tmp_path: Path) -> None:
    """In two files; the held-out part is the last documents."""
    (tmp_path / "in").mkdir()
    writers.WRITERS[name](tmp_path / "in" / f"a{name}", DOCUMENTS[:25])
    writers.WRITERS[name](tmp_path / "in" / f"b{name}", DOCUMENTS[25:])
    manifest, _ = indexed(tmp_path / "in", tmp_path / "shards", separate_documents=separate)
    assert not list((tmp_path / "shards").rglob("*.bin"))  # nothing is copied
    held_out = int(np.argmax(np.cumsum([len(ids) for ids in DOCUMENTS]) >= 0.9 * manifest.tokens)) + 1
    for split, documents in (("train", DOCUMENTS[:held_out]), ("validation", DOCUMENTS[held_out:])):
        found = TokenShards.open(tmp_path / "shards" / "web", split, tokenizer=Tokenizer.load(TOKENIZER))
        expected = make_shards(documents, marks=Marks(None, EOS))
        assert found.num_tokens == expected.num_tokens
        ours, theirs = (PackedBatches([it], [Phase(0, 4, 8, (1.0,))], 4, 1, separate) for it in (expected, found))
        for step in range(2 * ours.steps_per_epoch):
            assert_same(ours.batch(step, range(4)), theirs.batch(step, range(4)))
        ours, theirs = (EvaluationBatches(it, 8, 4, separate) for it in (expected, found))
        for step in range(ours.steps_per_epoch):
            assert_same(ours.batch(step, range(4)), theirs.batch(step, range(4)))


def test_the_manifest_names_ranges_of_the_files(tmp_path: Path) -> None:
    path = writers.llm_c(tmp_path / "web.bin", DOCUMENTS)
    manifest, report = indexed(path, tmp_path / "shards")
    [train], [held_out] = manifest.train, manifest.validation
    assert (train.file, train.offset) == (held_out.file, 1024) == (str(path), 1024)
    assert held_out.offset == 1024 + 2 * train.tokens
    ids = np.array(writers.stream(DOCUMENTS), "<u2")
    assert train.tokens + held_out.tokens == len(ids)
    assert ids[train.tokens - 1] == EOS
    assert train.xxh3_128 == xxhash.xxh3_128(ids[: train.tokens]).hexdigest()
    assert (train.documents or 0) + (held_out.documents or 0) == len(DOCUMENTS)
    assert (manifest.bos_id, manifest.eos_id, manifest.text_bytes) == (None, EOS, None)
    assert f"web: 60 documents, {len(ids):,} tokens" in str(report)
    assert f"read in place: 1 file (llm.c uint16); largest id {ids.max():,} of 1,024" in str(report)


def test_paths_are_relative_where_the_config_has_them_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writers.flat(Path("web.bin"), DOCUMENTS)
    manifest, _ = indexed(Path("web.bin"), Path("shards"))
    assert manifest.train[0].file == "../../web.bin"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("web.bin", "shards"):
        (tmp_path / name).rename(moved / name)
    assert TokenShards.open(moved / "shards" / "web", "train").num_tokens == manifest.train[0].tokens


def test_files_named_so_are_held_out(tmp_path: Path) -> None:
    for name, documents in (("train.bin", DOCUMENTS[:50]), ("val.bin", DOCUMENTS[50:])):
        writers.flat(tmp_path / name, documents)
    writers.numpy(tmp_path / "other.npy", [[9, 9, EOS]])
    for settings, held_out in (({}, "val.bin"), ({"validation": str(tmp_path / "other.npy")}, "other.npy")):
        manifest, _ = indexed(tmp_path / "train.bin", tmp_path / f"shards-{held_out}", **settings)
        assert [Path(shard.file or "").name for shard in manifest.train] == ["train.bin"]
        assert [Path(shard.file or "").name for shard in manifest.validation] == [held_out]
    manifest, _ = indexed(tmp_path / "other.npy", tmp_path / "shards", validation_fraction=0)
    assert manifest.validation == ()


def refused(message: str, path: Path, shards: Path, **settings: object) -> None:
    with pytest.raises(UsageError, match=message) as error:
        indexed(path, shards, **settings)
    assert "\n" not in str(error.value)
    assert not list(shards.rglob("manifest.json"))


def test_an_id_above_the_vocabulary_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lm.data.stream.CHUNK_TOKENS", 100)
    documents = [*DOCUMENTS, [VOCABULARY, EOS]]
    place = len(writers.stream(DOCUMENTS))
    for name, write in writers.WRITERS.items():
        path = write(tmp_path / name, documents)
        where = (
            rf"{path}: id 1024 at token {place} \(byte {path.stat().st_size - 4}\) is outside the vocabulary of 1024"
        )
        refused(where, path, tmp_path / "shards")
    path = writers.megatron(tmp_path / "signed.bin", [[5, -7, EOS]], "int32")
    refused(r"id -7 at token 1 \(byte 4\) is outside .*, read as Megatron uint32", path, tmp_path / "shards")


def test_tokens_that_come_twice_are_refused(tmp_path: Path) -> None:
    one, copy = (writers.flat(tmp_path / name, DOCUMENTS) for name in ("one.bin", "two.bin"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.bin").symlink_to(one)
    (tmp_path / "links" / "b.bin").hardlink_to(one)
    refused(f"{copy} holds the same tokens as {one}", tmp_path / "*.bin", tmp_path / "shards", validation_fraction=0)
    refused("b.bin comes twice, the other time as .*a.bin", tmp_path / "links", tmp_path / "shards")
    refused("one.bin is in training and held out", one, tmp_path / "shards", validation=str(one))


def test_ends_that_are_not_marked_are_refused_unless_documents_attend_to_each_other(tmp_path: Path) -> None:
    documents = [ids[:-1] for ids in DOCUMENTS]
    with_index = writers.megatron(tmp_path / "a.bin", documents)
    flat = writers.flat(tmp_path / "b.bin", documents)
    cure = "set data.separate_documents=false"
    refused(
        rf"source 'web': 0 of 60 documents end with the tokenizer's eos, id 1, so .*{cure}", with_index, tmp_path / "s"
    )
    refused(rf"source 'web': its token files hold no eos of the tokenizer, id 1, so .*{cure}", flat, tmp_path / "s")
    for number, path in enumerate((with_index, flat)):
        _, report = indexed(path, tmp_path / f"shards{number}", separate_documents=False)
        assert "warning: " in str(report)


def test_what_does_not_look_right_is_said(tmp_path: Path) -> None:
    few = [[*range(8, 16), *([EOS] if number % 5 else [])] for number in range(20_000)]
    _, report = indexed(writers.datatrove(tmp_path / "a.ds", few), tmp_path / "shards")
    assert "80.0% of 20,000 documents end with eos (id 1)" in str(report)
    assert "warning: 4,000 documents do not end with eos" in str(report)
    assert "warning: a quarter of the vocabulary never comes; is this the tokenizer" in str(report)
    _, report = indexed(writers.megatron(tmp_path / "b.bin", [[5, EOS, 6, EOS]] * 9), tmp_path / "other")
    assert "warning: eos comes 9 times within documents" in str(report)


def test_files_of_two_types_and_files_without_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    writers.numpy(tmp_path / "in" / "a.npy", DOCUMENTS)
    writers.numpy(tmp_path / "in" / "b.npy", DOCUMENTS, "uint32")
    refused("a.npy has ids of type uint16 and .*b.npy uint32; give each type a source", tmp_path / "in", tmp_path / "s")
    (tmp_path / "empty.bin").write_bytes(b"")
    refused("are empty", tmp_path / "empty.bin", tmp_path / "s")
    refused(
        "validation_fraction=0.999.* holds out all",
        tmp_path / "in" / "a.npy",
        tmp_path / "s",
        validation_fraction=0.9999,
    )


def test_the_same_command_again_reads_nothing_and_other_files_are_refused(tmp_path: Path) -> None:
    path = writers.flat(tmp_path / "web.bin", DOCUMENTS)
    indexed(path, tmp_path / "shards")
    _, report = indexed(path, tmp_path / "shards")
    assert "up to date" in str(report)
    writers.flat(path, DOCUMENTS[:40])
    with pytest.raises(UsageError, match="was prepared from something else: train was 1 with names and sizes"):
        indexed(path, tmp_path / "shards")


def test_a_file_that_was_altered_or_cut_since_is_refused_by_name(tmp_path: Path) -> None:
    path = writers.flat(tmp_path / "web.bin", DOCUMENTS)
    indexed(path, tmp_path / "shards")
    content = path.read_bytes()
    path.write_bytes(b"\x09\x00" + content[2:])
    with pytest.raises(UsageError, match=r"shard .*web.bin is corrupt"):
        TokenShards.open(tmp_path / "shards" / "web", "train", verify=True)
    path.write_bytes(content[:100])
    with pytest.raises(UsageError, match=r"shard .*web.bin has 100 bytes, expected"):
        TokenShards.open(tmp_path / "shards" / "web", "train", verify=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a"}, "needs exactly one of path, dataset, stdlib, tokens"),
        ({"text_field": "body"}, "text_field=body is for text, and source 'web' is token files"),
        ({"max_bytes": 9}, "max_bytes=9 is for text"),
    ],
)
def test_keys_of_text_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    source = {"name": "web", "tokens": {"path": "web.bin"}} | settings
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"sources": [source], "tokenizer": TOKENIZER, "shards": tmp_path})
