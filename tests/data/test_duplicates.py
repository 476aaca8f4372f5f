from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.data import DataConfig
from moe_lm.data import crew, duplicates
from moe_lm.data.crew import Ranks
from moe_lm.data.prepare import prepare
from moe_lm.data.report import PrepareReport
from moe_lm.data.shards import TokenShards
from moe_lm.text import pieces
from moe_lm.text.files import Report
from moe_lm.text.sources import read_documents
from moe_lm.tokenizer.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "tokenizer" / "tiny"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces of a source, and many parts of its hashes."""
    monkeypatch.setattr(pieces, "SMALLEST", 20_000)
    monkeypatch.setattr(duplicates, "PART_DOCUMENTS", 100)


@pytest.fixture(scope="module")
def corpus(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Poems in two files, of which each has some again from itself, and the second has some of the first."""
    from moe_lm.config.data import SourceConfig

    poems = SourceConfig(name="poems", path=str(shared_data / "text" / "yuanqu-zh.jsonl.xz"), max_bytes=150_000)
    texts = list(dict.fromkeys(document.text for document in read_documents(poems, Report())))
    random_, middle = random.Random(0), len(texts) // 2
    first, second = texts[:middle], texts[middle:]
    first += random_.choices(first, k=40)
    second += random_.choices(second, k=20) + random_.choices(first, k=30)
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in ("first", first), ("second", second):
        random_.shuffle(part)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def config(corpus: Path, shards: Path, **settings: object) -> DataConfig:
    sources = [{"name": name, "path": str(corpus / f"{name}.jsonl")} for name in ("first", "second")]
    values = {"sources": sources, "tokenizer": TOKENIZER, "shards": shards, "validation_fraction": 0, "workers": 1}
    return DataConfig.model_validate(values | {"drop_duplicates": True} | settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_in(folder: Path) -> list[str]:
    tokenizer, shards = Tokenizer.load(TOKENIZER), TokenShards.open(folder, "train")
    return [tokenizer.decode(ids[1:-1].tolist(), skip_special=False) for ids in shards.documents()]


def left(settings: DataConfig) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """What a set of Python leaves of each source, and the numbers of the rows that it leaves out."""
    seen, kept, out = set[str](), dict[str, list[str]](), dict[str, list[int]]()
    for source in settings.sources:
        kept[source.name], out[source.name] = [], []
        for number, document in enumerate(read_documents(source, Report()), 1):
            (out[source.name].append(number) if document.text in seen else kept[source.name].append(document.text))
            seen.add(document.text)
    return kept, out


@pytest.mark.parametrize("max_bytes", [None, 40_000])
def test_what_is_left_is_what_a_set_leaves(corpus: Path, tmp_path: Path, max_bytes: int | None) -> None:
    settings = config(corpus, tmp_path / "shards")
    sources = tuple(source.model_copy(update={"max_bytes": max_bytes}) for source in settings.sources)
    settings = settings.model_copy(update={"sources": sources})
    report = prepare(settings)
    kept, out = left(settings)
    for name, texts in kept.items():
        assert texts_in(tmp_path / "shards" / name) == texts
        manifest = report.manifests[name]
        assert manifest.skipped == {"duplicate": len(out[name])}
        assert manifest.examples == {"duplicate": f"{name}.jsonl:{out[name][0]}"}
        assert len(manifest.train) > 1
    assert f"{len(out['first'])} skipped: duplicate (first: first.jsonl:{out['first'][0]})" in str(report)


def in_child(work: Callable[[], object]) -> int:
    """Run in a fork of this process; the signal that ended it, or its exit code as a negative number."""
    if not (child := os.fork()):
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_ranks(settings: DataConfig, notes: Path) -> tuple[PrepareReport, int]:
    """Rank 1 in a fork of this process, which is rank 0. They share a folder alone."""

    def first(mine: str) -> str:
        if mine.startswith('["session'):
            notes.with_suffix(".new").write_text(mine)
            notes.with_suffix(".new").replace(notes)
        while not notes.exists():
            time.sleep(0.01)
        return notes.read_text()

    child = in_child(lambda: prepare(settings, ranks=Ranks(1, 2, first)))
    report = prepare(settings, ranks=Ranks(0, 2, first))
    return report, ended(child)


@pytest.mark.parametrize("drop", [True, False])
def test_two_ranks_write_the_same_bytes(corpus: Path, tmp_path: Path, drop: bool) -> None:
    alone = prepare(config(corpus, tmp_path / "alone", drop_duplicates=drop))
    report, exit_code = two_ranks(config(corpus, tmp_path / "two", drop_duplicates=drop), tmp_path / "note")
    assert exit_code == 0
    assert (report.manifests, contents(tmp_path / "two")) == (alone.manifests, contents(tmp_path / "alone"))


@pytest.mark.slow
def test_processes_write_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(config(corpus, tmp_path / str(workers), workers=workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("job", [duplicates.Hashing, duplicates.Marking])
def test_what_a_killed_run_has_found_is_kept(
    corpus: Path, tmp_path: Path, job: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, done, do = config(corpus, tmp_path / "killed"), list[int](), job.do

    def do_and_die(self: object, number: int, *args: object) -> None:
        do(self, number, *args)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def do_and_count(self: object, number: int, *args: object) -> None:
        done.append(number)
        do(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(job, "do", do_and_die)
        assert ended(in_child(lambda: prepare(settings))) == -signal.SIGKILL
    monkeypatch.setattr(job, "do", do_and_count)
    prepare(settings)
    assert done[0] == 2
    prepare(config(corpus, tmp_path / "undisturbed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_a_new_source_loses_what_those_before_have_and_leaves_them_as_they_are(corpus: Path, tmp_path: Path) -> None:
    both = config(corpus, tmp_path / "shards")
    prepare(both.model_copy(update={"sources": both.sources[:1]}))
    prepare(both)
    prepare(config(corpus, tmp_path / "at_once"))
    assert contents(tmp_path / "shards") == contents(tmp_path / "at_once")
    with pytest.raises(UsageError, match="prepared from something else: drop_duplicates was within it"):
        prepare(both.model_copy(update={"drop_duplicates": False}))


def test_one_alone_takes_over_from_the_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, one, other = (crew.Claims(tmp_path) for _ in range(3))
    claim = dead.take("00000")
    assert claim is not None
    assert [one.take("00000"), other.take("00000")] == [None, None]
    monkeypatch.setattr(crew, "DEAD_SECONDS", 0.0)
    taken = one.take("00000")
    assert taken is not None
    assert other.take("00000") is None
    assert (dead.is_last(claim), one.is_last(taken)) == (False, True)
