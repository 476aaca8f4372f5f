import hashlib
import json
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xxhash import xxh3_128_hexdigest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import OpenFiles
from moe_lm.config.data import DataConfig, Phase
from moe_lm.data.batches import EvaluationBatches, PackedBatches
from moe_lm.data.marks import Marks
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import Manifest, Shard, TokenShards, read_index
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.ahead import Ahead

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"
GPT2 = Path("vectors", "gpt2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of ten short documents."""
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"Document number {number}. " * (number + 1))
    source = {"name": "corpus", "path": str(tmp_path / "*.txt")}
    values = {"sources": [source], "tokenizer": TOKENIZER, "shards": tmp_path / "shards", "workers": 1}
    prepare(DataConfig.model_validate(values))
    return tmp_path / "shards" / "corpus"


def change_manifest(folder: Path, edit: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_split_opens_with_its_counts(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    shards = TokenShards.open(folder, "train", tokenizer=tiny_tokenizer)
    index = read_index(folder, shards.shards)
    assert shards.num_documents == len(index) == 9
    assert [len(document) for document in shards.documents()] == index[:, 0].tolist()
    assert all(document[0] == tiny_tokenizer.bos_id for document in shards.documents())
    assert shards.text_bytes == index[:, 1].sum()


def test_the_tokenizer_must_be_the_one_that_made_the_shards(folder: Path, shared_data: Path) -> None:
    with pytest.raises(UsageError, match=f"{folder} was made with tokenizer .* use that tokenizer"):
        TokenShards.open(folder, "train", tokenizer=Tokenizer.load(shared_data / GPT2))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.index"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.__setitem__(11, data[11] ^ 1), "is corrupt: xxh3_128"),
        (lambda data: data.clear(), "has 0 bytes, expected"),
        (lambda data: data.pop(), "has .* bytes, expected"),
        (lambda data: data.append(0), "has .* bytes, expected"),
    ],
)
def test_a_shard_that_was_altered_is_refused_by_name(
    folder: Path, name: str, edit: Callable[[bytearray], object], message: str
) -> None:
    data = bytearray((folder / name).read_bytes())
    edit(data)
    (folder / name).write_bytes(data)
    with pytest.raises(UsageError, match=f"shard .*{name} {message}.*delete {folder} and run moe-lm prepare"):
        TokenShards.open(folder, "train", verify=True)


@pytest.mark.parametrize(
    ("name", "verify"), [("train-00000.bin", False), ("train-00000.bin", True), ("train-00000.index", True)]
)
def test_a_missing_shard_is_refused_by_name(folder: Path, name: str, verify: bool) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"shard .*{name} is missing"):
        TokenShards.open(folder, "train", verify=verify)


def in_format_1(folder: Path) -> None:
    """Give the manifest of a folder the form that it had in version 0.1.0."""

    def edit(manifest: Any) -> None:
        manifest["format"] = 1
        del manifest["bos_id"], manifest["eos_id"]
        for shard in (*manifest["train"], *manifest["validation"]):
            for key in ("file", "offset", "xxh3_128", "index_xxh3_128"):
                del shard[key]
            for key, suffix in (("sha256", "bin"), ("index_sha256", "index")):
                shard[key] = hashlib.sha256((folder / f"{shard['name']}.{suffix}").read_bytes()).hexdigest()

    change_manifest(folder, edit)


def test_shards_of_format_1_open_with_the_fingerprint_that_they_had(folder: Path) -> None:
    """Runs that began on them know their data by it."""
    new = TokenShards.open(folder, "train")
    in_format_1(folder)
    old = TokenShards.open(folder, "train")
    files = (folder / "train-00000.bin", folder / "train-00000.index")
    sums = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert old.fingerprint == hashlib.sha256(sums.encode()).hexdigest() != new.fingerprint
    assert np.array_equal(old.tokens(0, old.num_tokens), new.tokens(0, new.num_tokens))
    (folder / "train-00000.bin").write_bytes(bytes((folder / "train-00000.bin").stat().st_size))
    with pytest.raises(UsageError, match="is corrupt: sha256"):
        TokenShards.open(folder, "train", verify=True)


def test_a_shard_may_be_a_range_of_a_file_of_another_program(folder: Path) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    elsewhere = folder.parent / "theirs.bin"
    elsewhere.write_bytes(b"a header" + tokens.tobytes())
    change = {"file": "../theirs.bin", "offset": 8, "index_xxh3_128": None, "documents": None, "text_bytes": None}
    change_manifest(folder, lambda manifest: manifest["train"][0].update(change))
    (folder / "train-00000.bin").unlink()
    (folder / "train-00000.index").unlink()
    shards = TokenShards.open(folder, "train")
    assert np.array_equal(shards.tokens(0, shards.num_tokens), tokens)
    os.truncate(elsewhere, 100)
    with pytest.raises(UsageError, match=r"theirs.bin has 100 bytes, expected "):
        TokenShards.open(folder, "train")


def test_the_other_split_opens_all_the_same(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    assert TokenShards.open(folder, "validation").num_documents == 1


def test_a_token_outside_the_vocabulary_is_named_with_file_and_offset(folder: Path) -> None:
    """The checksum fits, so that whoever wrote the shard wrote the token."""
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[17] = 5000
    tokens.tofile(folder / "train-00000.bin")
    change_manifest(folder, lambda manifest: manifest["train"][0].update(xxh3_128=xxh3_128_hexdigest(tokens.tobytes())))
    with pytest.raises(UsageError, match=r"train-00000.bin: token 5000 at offset 17 is outside the vocabulary of 1024"):
        TokenShards.open(folder, "train", verify=True)


def test_the_tokenizer_bounds_the_tokens_whatever_the_manifest_says(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[17] = 5000
    tokens.tofile(folder / "train-00000.bin")
    change_manifest(folder, lambda manifest: manifest["train"][0].update(xxh3_128=xxh3_128_hexdigest(tokens.tobytes())))
    change_manifest(folder, lambda manifest: manifest.update(vocab_size=60_000))
    assert TokenShards.open(folder, "train", verify=True).num_tokens == len(tokens)
    with pytest.raises(UsageError, match="token 5000 at offset 17 is outside the vocabulary of 1024"):
        TokenShards.open(folder, "train", verify=True, tokenizer=tiny_tokenizer)


@pytest.fixture
def in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same documents in shards of 100 tokens or a little more."""
    monkeypatch.setattr("moe_lm.text.pieces.SMALLEST", 100)
    source = {"name": "corpus", "path": str(folder.parents[1] / "*.txt")}
    values = {"sources": [source], "tokenizer": TOKENIZER, "shards": folder.parents[1] / "pieces", "workers": 1}
    prepare(DataConfig.model_validate(values))
    return folder.parents[1] / "pieces" / "corpus"


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.index"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3] + b"abc")])
def test_a_damaged_shard_is_left_out_where_that_is_chosen(
    in_pieces: Path, name: str, damage: Callable[[Path], object]
) -> None:
    whole = TokenShards.open(in_pieces, "train", verify=True)
    sizes = [len(file) for file in whole.files]
    assert len(sizes) > 2
    damage(in_pieces / name)
    with pytest.raises(UsageError, match=f"{name} is .*or set data.on_damage=leave_out"):
        TokenShards.open(in_pieces, "train", verify=True)
    rest = TokenShards.open(in_pieces, "train", verify=True, on_damage="leave_out")
    assert [len(file) for file in rest.files] == [sizes[0], *sizes[2:]]
    tokens = whole.tokens(0, sizes[0]), whole.tokens(sizes[0] + sizes[1], sum(sizes))
    assert np.array_equal(rest.tokens(0, rest.num_tokens), np.concatenate(tokens))
    assert rest.fingerprint != whole.fingerprint
    assert str(rest.left_out).startswith(
        f"1 of the {len(sizes)} train shards in {in_pieces} are left out, as data.on_damage=leave_out asks, with "
        f"{sizes[1]} of {sum(sizes)} tokens ({sizes[1] / sum(sizes):.2%}): shard {in_pieces / name} is "
    )


def test_a_shard_that_is_cut_while_it_is_read_is_named(folder: Path) -> None:
    """Mapped into memory it would end the process by SIGBUS."""
    batches = PackedBatches(
        [TokenShards.open(folder, "train")], [Phase(0, 4, 16, (1.0,))], 4, seed=1, separate_documents=True
    )
    before = [batches.batch(step, range(4)).input_ids.tolist() for step in range(batches.steps_per_epoch)]
    os.truncate(folder / "train-00000.bin", 100)
    with pytest.raises(MoeLmError, match=r"train-00000.bin ends before byte .*: it was cut short after it was opened"):
        [batches.batch(step, range(4)) for step in range(batches.steps_per_epoch)]
    assert len(before) > 2


def test_a_token_outside_the_vocabulary_is_named_when_a_batch_reads_it(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[17] = 5000
    tokens.tofile(folder / "train-00000.bin")
    shards = TokenShards.open(folder, "train", tokenizer=tiny_tokenizer)
    batches = PackedBatches([shards], [Phase(0, 4, 16, (1.0,))], 4, seed=1, separate_documents=True)
    with pytest.raises(MoeLmError, match=r"train-00000.bin: token 5000 at offset 17 is outside the vocabulary of 1024"):
        [batches.batch(step, range(4)) for step in range(batches.steps_per_epoch)]


def test_few_files_are_open_however_many_there_are(in_pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what one thread reads is not closed by another."""
    monkeypatch.setattr("moe_lm.data.stream._open_files", OpenFiles(2))
    shards = TokenShards.open(in_pieces, "train")
    assert len(shards.files) > 3
    expected = np.concatenate([np.fromfile(file, "<u2") for file in sorted(in_pieces.glob("train-*.bin"))])

    def reads(_: int) -> bool:
        starts = range(0, len(expected), 40)
        return all(np.array_equal(shards.tokens(at, at + 150), expected[at : at + 150]) for at in starts)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reads, range(8)))
    assert reads(0)
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert 0 < sum(link.startswith(str(in_pieces)) for link in links) <= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "train-00000"}, "shard train-00000 is there twice"),
        ({"file": "train-00000.bin"}, "shards train-00000 and train-00001 overlap in train-00000.bin at byte 0"),
    ],
)
def test_shards_that_are_there_twice_or_overlap_are_refused(in_pieces: Path, change: dict[str, str], said: str) -> None:
    change_manifest(in_pieces, lambda manifest: manifest["train"][0].update(file="train-00000.bin"))
    change_manifest(in_pieces, lambda manifest: manifest["train"][1].update(change))
    with pytest.raises(UsageError, match=said):
        TokenShards.open(in_pieces, "train")


def test_a_shard_that_is_a_symbolic_link_is_refused(folder: Path) -> None:
    (folder / "train-00000.bin").rename(folder / "elsewhere")
    (folder / "train-00000.bin").symlink_to(folder / "elsewhere")
    with pytest.raises(UsageError, match=r"train-00000.bin is a symbolic link"):
        TokenShards.open(folder, "train")


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda manifest: manifest.pop("train"), "train"),
        (lambda manifest: manifest.update(format=3), "format"),
        (lambda manifest: manifest.update(extra=1), "extra"),
        (lambda manifest: manifest["train"][0].update(tokens=-1), "train.0.tokens"),
        (lambda manifest: manifest["train"][0].pop("xxh3_128"), "train.0: Value error, expected one of"),
        (lambda manifest: manifest.update(dtype="O"), "dtype"),
        *[
            (lambda manifest, name=name: manifest["train"][0].update(name=name), "train.0.name")
            for name in ("../train-00000", "/etc/passwd", "train-00000/../x", "train-00000.bin", "train-0000")
        ],
    ],
)
def test_a_damaged_manifest_is_refused_by_name(folder: Path, edit: Callable[[Any], object], field: str) -> None:
    change_manifest(folder, edit)
    with pytest.raises(UsageError, match=f"manifest.json is damaged: {field}"):
        TokenShards.open(folder, "train")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([[5, 6, 1, 7], [8, 1, 9]], [[5, 6, 1], [7, 8, 1], [9]]),
        ([[1, 5, 6], [1, 7, 8]], [[1], [5, 6, 1], [7, 8]]),
    ],
    ids=["open at the end of a file", "eos before each document, as llm.c writes"],
)
def test_foreign_documents_are_those_that_training_divides(files: list[list[int]], expected: list[list[int]]) -> None:
    tokens = tuple(np.array(file, "<u2") for file in files)
    shards = TokenShards(Path("in-memory"), "train", tokens, Marks(None, 1), "in-memory")
    assert [document.tolist() for document in shards.documents()] == expected
    batch = EvaluationBatches(shards, shards.num_tokens - 1, 1, separate_documents=True).batch(0, range(1))
    ends = np.cumsum([len(document) for document in expected])[:-1].tolist()
    assert batch.cu_seqlens.tolist()[1:-1] == [end for end in ends if end < shards.num_tokens - 1]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"manifest.json is damaged"):
        TokenShards.open(folder, "train")


def test_a_folder_without_shards_asks_for_prepare(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run moe-lm prepare"):
        TokenShards.open(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_more_shards_than_files_may_be_open_are_read_ahead(count: int, tmp_path: Path) -> None:
    """They were mapped or kept open once, one descriptor each."""
    tokens, shards = np.arange(count * 16 + 1, dtype="<u2") % 1000 + 2, []
    for number, part in enumerate(np.split(tokens, range(16, count * 16, 16))):
        part.tofile(tmp_path / f"train-{number:05d}.bin")
        shards.append(
            Shard(name=f"train-{number:05d}", tokens=len(part), documents=None, text_bytes=None, xxh3_128="0")
        )
    manifest = Manifest(
        made_from={}, tokenizer="", vocab_size=1024, dtype="<u2", bos_id=0, eos_id=1,
        train=tuple(shards), validation=(), skipped={}, examples={},
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 72, hard))  # 64 for shards
    try:
        whole = TokenShards.open(tmp_path, "train")
        batches = PackedBatches([whole], [Phase(0, 64, 16, (1.0,))], 64, 1, True)
        steps = batches.steps_per_epoch
        with Ahead(lambda step: [batches.batch(step, range(64))], torch.device("cpu")) as ahead:
            read = sum(int(ahead.take(step, steps - 1).micro_batches[0].input_ids.sum()) for step in range(steps))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read >= tokens[:-1].sum(dtype=int)  # an epoch, and the beginning of the next in its last batch
