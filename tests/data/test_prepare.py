import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import DataConfig
from moe_lm.data.prepare import prepare
from moe_lm.data.shards import TokenShards, read_index, read_manifest, token_dtype
from moe_lm.text import pieces
from moe_lm.text.sources import Report, read_documents
from moe_lm.text.split import held_out
from moe_lm.tokenizer.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two hundred rows and a folder of text, with some of each that cannot be used."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [
        {"text": f"Row {number}: " + "the quick brown fox, 敏捷的棕色狐狸。 " * (number % 7)} for number in range(200)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.jsonl").open("ab").write(b'{"text": "\xff"}\n{"text": ""}\n{broken\n')
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "letters.txt").write_text("a" * 300_000 + "\n\n<|end|> <|eos|>\r\n\ttabs")
    return folder


def config(corpus: Path, shards: Path, **settings: object) -> DataConfig:
    source = {"name": "corpus", "path": str(corpus)}
    if "piece_bytes" in settings:
        source |= {"piece_bytes": str(settings.pop("piece_bytes"))}
    values = {"sources": [source], "tokenizer": TOKENIZER, "shards": shards, "validation_fraction": 0.1, "workers": 1}
    return DataConfig.model_validate(values | settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder of shards."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(shards: TokenShards, tokenizer: Tokenizer) -> list[str]:
    texts = []
    for document in shards.documents():
        bos, *ids, eos = document.tolist()
        assert (bos, eos) == (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode(ids, skip_special=False))
    return texts


def test_what_is_kept_round_trips_and_what_is_not_is_reported(
    corpus: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    settings = config(corpus, tmp_path / "shards")
    report = prepare(settings)
    train, validation = (TokenShards.open(tmp_path / "shards" / "corpus", split) for split in ("train", "validation"))
    read = Report()
    originals = list(read_documents(settings.sources[0], read))
    kept = [item.text for item in originals if not held_out(item.id, 0.1)]
    assert documents_of(train, tiny_tokenizer) == kept
    assert documents_of(validation, tiny_tokenizer) == [item.text for item in originals if held_out(item.id, 0.1)]
    assert train.num_documents + validation.num_documents == read.documents == 202
    assert train.text_bytes + validation.text_bytes == read.text_bytes
    assert read_index(train.folder, train.shards)[:, 1].tolist() == [len(text.encode()) for text in kept]
    manifest = report.manifests["corpus"]
    assert (manifest.documents, manifest.text_bytes) == (read.documents, read.text_bytes)
    assert manifest.tokens == train.num_tokens + validation.num_tokens
    assert manifest.skipped == {"NUL byte": 1, "invalid UTF-8": 1, "empty document": 1, "broken JSON": 1}
    assert "1 skipped: invalid UTF-8 (first: rows.jsonl:201)" in str(report)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SMALLEST", 4000)


@pytest.mark.slow  # as it starts processes
@pytest.mark.usefixtures("small_pieces")
def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(config(corpus, tmp_path / str(workers), workers=workers))
    assert contents(tmp_path / "1" / "corpus") == contents(tmp_path / "3" / "corpus")


@pytest.mark.usefixtures("small_pieces")
def test_shards_of_another_size_hold_the_same_stream(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config(corpus, tmp_path / "many"))
    monkeypatch.setattr(pieces, "SMALLEST", 4 << 20)
    prepare(config(corpus, tmp_path / "one"))
    one, many = (TokenShards.open(tmp_path / name / "corpus", "train") for name in ("one", "many"))
    assert (len(one.files), len(many.files)) == (1, 13)
    assert np.array_equal(one.tokens(0, one.num_tokens), many.tokens(0, many.num_tokens))
    assert np.array_equal(*(read_index(shards.folder, shards.shards) for shards in (one, many)))


PREPARE_AND_DIE = textwrap.dedent("""
    import os, signal
    from moe_lm.config.data import DataConfig
    from moe_lm.data import chunks, prepare
    from moe_lm.text import pieces

    def die(countdown=[int(sys.argv[3])]):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    pieces.SMALLEST = 4000
    config = DataConfig.model_validate_json(sys.argv[1])
    if sys.argv[2] == "writing":
        close = chunks._Writer.close
        chunks._Writer.close = lambda writer: (close(writer), die())[0]
    if sys.argv[2] == "finishing":
        prepare._remove_shards = lambda folder, keep: keep and die()
    prepare.prepare(config, lambda done, total: sys.argv[2] == "tokenizing" and die())
""")


def prepare_and_die(settings: DataConfig, where: str, countdown: int) -> None:
    if settings.workers == 1 and not (child := os.fork()):
        try:
            exec(PREPARE_AND_DIE, {"sys": argparse.Namespace(argv=["", settings.model_dump_json(), where, countdown])})
        finally:
            os._exit(1)
    if settings.workers == 1:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    command = [
        sys.executable,
        "-c",
        "import sys\n" + PREPARE_AND_DIE,
        settings.model_dump_json(),
        where,
        str(countdown),
    ]
    # The workers hold the pipe too: that it ends within the timeout shows that none of them lives on.
    process = subprocess.run(command, capture_output=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("where", "countdown"),
    [
        *(pytest.param("tokenizing", countdown, marks=pytest.mark.slow) for countdown in (1, 8)),
        ("writing", 7),
        ("finishing", 1),
    ],
)
def test_after_sigkill_a_second_run_ends_where_an_undisturbed_one_does(
    corpus: Path, tmp_path: Path, where: str, countdown: int
) -> None:
    prepare(config(corpus, tmp_path / "undisturbed"))
    killed = config(corpus, tmp_path / "killed", workers=2 if where == "tokenizing" else 1)
    prepare_and_die(killed, where, countdown)
    folder = tmp_path / "killed" / "corpus"
    with pytest.raises(UsageError, match="there are no shards in"):
        TokenShards.open(folder, "train")
    records = {int(path.stem[-5:]) for path in folder.glob(".work-*/piece-*.json")}
    whole = {name: os.stat(folder / name).st_ino for name in os.listdir(folder) if name[-9:-4].isdigit()}
    finished = {name: inode for name, inode in whole.items() if int(name[-9:-4]) in records}
    assert len(records) >= {"tokenizing": countdown - 3, "writing": 3, "finishing": 9}[where]
    prepare(killed)
    assert {name: os.stat(folder / name).st_ino for name in finished} == finished  # none was written again
    assert contents(folder) == contents(tmp_path / "undisturbed" / "corpus")


def test_a_finished_folder_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tmp_path / "shards"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards" / "corpus").iterdir()}
    second = prepare(config(corpus, tmp_path / "shards"), lambda *_: pytest.fail("tokenized again"))
    assert second == first
    assert [str(report).splitlines()[0].endswith(", up to date") for report in (first, second)] == [False, True]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "shards" / "corpus").iterdir()}


def test_a_new_weight_or_source_keeps_the_other_shards(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "shards"))
    one = {"name": "corpus", "path": str(corpus), "weight": 3.0}
    two = {"name": "more", "path": str(corpus / "letters.txt")}
    report = prepare(config(corpus, tmp_path / "shards", sources=[one, two]))
    assert report.manifests.keys() == {"corpus", "more"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 0.2}, "validation_fraction was 0.1, is 0.2"),
        ({"sources": [{"name": "corpus", "path": "CORPUS", "max_bytes": 9}]}, "max_bytes was None, is 9"),
        ({"sources": [{"name": "corpus", "path": "CORPUS/rows.jsonl"}]}, "files was 3 .*, is 1"),
    ],
)
def test_shards_made_from_something_else_are_refused(
    corpus: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    prepare(config(corpus, tmp_path / "shards"))
    other = json.loads(json.dumps(change).replace("CORPUS", str(corpus)))
    with pytest.raises(UsageError, match=f"prepared from something else: {message}"):
        prepare(config(corpus, tmp_path / "shards", **other))


def test_a_corpus_that_grew_is_noticed(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "shards"))
    (corpus / "letters.txt").open("a").write("more")
    with pytest.raises(UsageError, match="files was 3 with names and sizes"):
        prepare(config(corpus, tmp_path / "shards"))


def test_what_an_interrupted_run_made_from_other_text_is_not_used(corpus: Path, tmp_path: Path) -> None:
    """The text changes under the same name and size, between a kill and the second run."""
    text = (corpus / "letters.txt").read_text()
    prepare_and_die(config(corpus, tmp_path / "killed"), "tokenizing", 3)
    (corpus / "letters.txt").write_text(text.replace("tabs", "bats"))
    prepare(config(corpus, tmp_path / "killed"))
    prepare(config(corpus, tmp_path / "fresh"))
    shards = [TokenShards.open(tmp_path / name / "corpus", "train") for name in ("killed", "fresh")]
    assert np.array_equal(*(item.tokens(0, item.num_tokens) for item in shards))


@pytest.mark.parametrize(("documents", "fraction", "expected"), [(3, 0.001, 1), (3, 0.0, 0), (1, 0.5, 0)])
def test_few_documents_hold_one_out_where_one_shall_and_can_be(
    tmp_path: Path, documents: int, fraction: float, expected: int
) -> None:
    for number in range(documents):
        (tmp_path / f"{number}.txt").write_text("text")
    prepare(config(tmp_path / "*.txt", tmp_path / "shards", validation_fraction=fraction))
    train, validation = (TokenShards.open(tmp_path / "shards" / "corpus", split) for split in ("train", "validation"))
    assert (train.num_documents, validation.num_documents) == (documents - expected, expected)
    assert (validation.num_tokens > 0, validation.text_bytes) == (expected > 0, expected * len("text"))


def test_a_long_file_is_said_to_be_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(("A line of a book.\n" * 400 + "\n") * 30)
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n' * 3)
    for name, said, held in (
        ("book.txt", "1 file in 3 pieces, 216,030 bytes", "1 piece"),
        ("rows.jsonl", "3 documents", "3 documents"),
    ):
        report = prepare(config(tmp_path / name, tmp_path / name.split(".")[0], validation_fraction=0.01))
        first, second = str(report).splitlines()[:2]
        assert first.startswith(f"corpus: {said}")
        assert re.fullmatch(rf"  held out: {held}, [\d,]+ tokens \([\d.]+%\)", second)
        assert "of the text is held out, as it has only 3" in str(report)
    finer = config(tmp_path / "book.txt", tmp_path / "finer", validation_fraction=0.01, piece_bytes=4096)
    report = prepare(finer)
    assert "1 file in 30 pieces" in str(report)
    assert "warning" not in str(report)
    with pytest.raises(UsageError, match="piece_bytes was 4096, is None"):
        prepare(config(tmp_path / "book.txt", tmp_path / "finer", validation_fraction=0.01))


def test_the_split_is_stable_and_close_to_the_fraction() -> None:
    first = {str(number) for number in range(20_000) if held_out(str(number), 0.05)}
    assert 0.045 < len(first) / 20_000 < 0.055
    assert first < {str(number) for number in range(20_000) if held_out(str(number), 0.06)}
    digest = hashlib.sha256(b"a/b.py").hexdigest()
    assert held_out("a/b.py", 0.5) == (digest[0] in "01234567")


@pytest.mark.parametrize(("vocab_size", "bits"), [(65536, 16), (65537, 32)])
def test_tokens_take_two_bytes_while_they_fit(vocab_size: int, bits: int) -> None:
    assert np.dtype(token_dtype(vocab_size)).itemsize * 8 == bits


def test_a_missing_source_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"source 'corpus': path .*nowhere does not exist"):
        prepare(config(tmp_path / "nowhere", tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_a_second_prepare_at_the_same_time_is_refused(corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, tmp_path / "shards")
    refused = []

    def prepare_again(done: int, total: int | None) -> None:
        with pytest.raises(UsageError, match="another process is preparing"):
            prepare(settings)
        refused.append((done, total))

    prepare(settings, prepare_again)
    assert refused == [(read_manifest(tmp_path / "shards" / "corpus").text_bytes, None)]
    assert read_manifest(tmp_path / "shards" / "corpus").documents == 202


def test_the_pieces_of_a_worker_that_was_killed_are_done_by_others(
    corpus: Path, tmp_path: Path, small_pieces: None
) -> None:
    prepare(config(corpus, tmp_path / "undisturbed"))
    killed = []

    def kill(done: int, total: int | None) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    report = prepare(config(corpus, tmp_path / "killed", workers=2), kill)
    assert contents(tmp_path / "killed" / "corpus") == contents(tmp_path / "undisturbed" / "corpus")
    assert report.died == 1
    assert str(report).endswith("memory ran out: 1 of the processes; the others did the rest")


@pytest.mark.slow
def test_where_every_worker_is_killed_one_sentence_says_so(corpus: Path, tmp_path: Path, small_pieces: None) -> None:
    settings = config(corpus, tmp_path / "killed", workers=2)
    with pytest.raises(MoeLmError, match="run the same command again to go on"):
        prepare(settings, lambda *_: [child.kill() for child in multiprocessing.active_children()] and None)


def test_a_file_that_changes_while_it_is_read_is_named(corpus: Path, tmp_path: Path) -> None:
    def change(done: int, total: int | None) -> None:
        (corpus / "letters.txt").write_text("other")

    with pytest.raises(MoeLmError, match=r"letters.txt to .* changed while prepare was reading it"):
        prepare(config(corpus, tmp_path / "shards"), change)


def test_max_bytes_ends_at_the_same_document_in_pieces(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"name": "corpus", "path": str(corpus), "max_bytes": 310_000}
    prepare(config(corpus, tmp_path / "one", sources=[source]))
    monkeypatch.setattr(pieces, "SMALLEST", 4000)
    prepare(config(corpus, tmp_path / "many", sources=[source]))
    one, many = (TokenShards.open(tmp_path / name / "corpus", "train") for name in ("one", "many"))
    assert 1 == len(one.files) < len(many.files)
    assert np.array_equal(one.tokens(0, one.num_tokens), many.tokens(0, many.num_tokens))
    manifests = [read_manifest(tmp_path / name / "corpus") for name in ("one", "many")]
    assert manifests[0].documents == manifests[1].documents
    assert (manifests[0].skipped, manifests[0].examples) == (manifests[1].skipped, manifests[1].examples)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_folder_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir(mode=0o500)
    with pytest.raises(MoeLmError, match=r"cannot write shards to .*Permission denied"):
        prepare(config(corpus, tmp_path / "shards"))


def test_a_file_in_the_place_of_the_folder_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").touch()
    with pytest.raises(MoeLmError, match=r"cannot write shards to .*shards/corpus"):
        prepare(config(corpus, tmp_path / "shards"))


def test_real_text_prepares_and_reads_back(shared_data: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    source = {"name": "poems", "path": str(shared_data / "text" / "yuanqu-zh.jsonl.xz"), "max_bytes": 400_000}
    settings = config(shared_data, tmp_path, sources=[source], workers=2)
    prepare(settings)
    originals = list(read_documents(settings.sources[0], Report()))
    validation = TokenShards.open(tmp_path / "poems", "validation", tokenizer=tiny_tokenizer)
    assert documents_of(validation, tiny_tokenizer) == [item.text for item in originals if held_out(item.id, 0.1)]
    assert 0.05 < validation.num_documents / len(originals) < 0.15
