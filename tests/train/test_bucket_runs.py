"""Runs that upload their checkpoints: the machine is lost and they go on elsewhere; the store is slow or dies."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from moe_lm.checkpoint import bucket, checkpoint, upload
from moe_lm.common import storage
from moe_lm.common.errors import UsageError
from moe_lm.common.exits import FAILED, MISUSED
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.advice import into_store
from moe_lm.parallel.topology import Topology
from moe_lm.train import pretrain
from moe_lm.train.summary import data_lines
from tests.processes import events, one_thread_here
from tests.runs import assert_same_run

pytestmark = pytest.mark.usefixtures("one_thread", "quick")
MoeLm = Callable[..., Any]
URL = "memory://bucket/run"
SHORT = (
    "train.steps=4",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "train.eval_every=0",
    f"checkpoint.upload_to={URL}",
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.01)
    yield
    MemoryFileSystem.store.clear()


def complete() -> list[int]:
    return sorted(step for step, item in bucket.stored(URL).items() if item.is_complete)


def assert_is_there(folder: Path) -> None:
    """The checkpoint in the store is that in the run folder, and sound."""
    assert checkpoint.damage_of(folder) is None
    for path in folder.rglob("*.*"):
        place = f"{URL}/checkpoints/{folder.name}/{path.relative_to(folder).as_posix()}"
        assert storage.read_bytes(place) == path.read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that was never stopped and knows no store."""
    run = tmp_path_factory.mktemp("whole")
    settings = (f"run_dir={run}", *SHORT, "checkpoint.upload_to=null")
    with one_thread_here():
        pretrain.run(load_config(PretrainConfig, tiny_pretrain, settings))
    return run


def test_a_run_whose_machine_is_lost_goes_on_from_the_bucket_to_the_bit(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, whole: Path
) -> None:
    """And one of which an upload was cut goes on from the checkpoint before it."""
    run = tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run}", *SHORT)
    assert moe_lm(*command, "checkpoint.keep=3").code == 0
    assert complete() == [2, 4]
    said = (run / "train.log").read_text()
    assert f"checkpoints     copied to {URL} as they are saved" in said
    assert f"the last checkpoint, step-00000004, is in {URL}" in said
    assert [line["step"] for line in events(run, "upload")][-1] == 4
    storage.remove([f"{URL}/checkpoints/step-00000004/{name}" for name in ("COMPLETE", "trainer.json")])
    shutil.rmtree(run)
    said = moe_lm("export", URL, tmp_path / "hf").err
    assert f"there is no folder {URL}; bring it here first: " in said
    assert f"checkpoint fetch {URL} runs/run" in said
    assert moe_lm("checkpoint", "fetch", URL, tmp_path / "copy").out.startswith("fetched step 2; next: ")
    assert moe_lm("checkpoint", "verify", tmp_path / "copy").code == 0
    said = moe_lm("checkpoint", "fetch", URL, tmp_path / "copy").err
    assert said == f"error: {tmp_path}/copy has step 2, and {URL} has no sound checkpoint that is newer\n"
    said = moe_lm("checkpoint", "fetch", f"{URL}2", tmp_path / "none").err
    assert said == f"error: there is no complete checkpoint in {URL}2; check the address\n"
    done = moe_lm(*command)
    assert (done.code, "going on after step 2 of 4" in done.out) == (0, True)
    assert f"fetched the checkpoint of step 2 from {URL}" in (run / "train.log").read_text()
    assert_same_run(whole, run)
    assert complete() == [4]
    assert_is_there(run / "checkpoints" / "step-00000004")
    assert not [name for name in MemoryFileSystem.store if ".write-test" in name]


@pytest.mark.slow
def test_a_damaged_checkpoint_in_the_bucket_is_passed_over_with_a_warning(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    run = tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run}", *SHORT, "checkpoint.keep=3")
    assert moe_lm(*command).code == 0
    (name,) = (name for name in bucket.stored(URL)[4].files if name.startswith("model/shard"))
    place = f"{URL}/checkpoints/step-00000004/{name}"
    content = bytearray(storage.read_bytes(place))
    content[-1] ^= 1
    storage.write_bytes(place, bytes(content))
    shutil.rmtree(run)
    done = moe_lm(*command)
    assert (done.code, "going on after step 2 of 4" in done.out) == (0, True)
    assert f"step-00000004/{name} does not have the checksum that the manifest gives" in (run / "train.log").read_text()
    assert complete() == [2, 4]
    assert_is_there(run / "checkpoints" / "step-00000004")


@pytest.mark.slow
def test_a_store_that_dies_in_the_middle_does_not_end_training_and_gets_what_it_missed(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, run = MemoryFileSystem.put_file, tmp_path / "run"

    def put_file(store: MemoryFileSystem, path: str, there: str, **how: Any) -> None:
        if "optimizer" in there:
            raise ConnectionResetError("reset by peer")
        real(store, path, there, **how)

    command = ("pretrain", tiny_pretrain, f"run_dir={run}", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", put_file)
        done = moe_lm(*command)
    assert (done.code, complete()) == (0, [])
    assert "reset by peer" in events(run, "failed_upload")[-1]["message"]
    assert "the last checkpoint, " not in (run / "train.log").read_text()
    assert moe_lm(*command).code == 0
    assert complete() == [4]


@pytest.mark.slow
def test_training_does_not_wait_for_a_store_and_the_end_waits_as_long_as_it_may(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, run, real = threading.Event(), tmp_path / "run", MemoryFileSystem.put_file

    def put_file(store: MemoryFileSystem, path: str, there: str, **how: Any) -> None:
        assert answers.wait(60)
        real(store, path, there, **how)

    monkeypatch.setattr(upload, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    try:
        done = moe_lm("pretrain", tiny_pretrain, f"run_dir={run}", *SHORT, "checkpoint.upload_timeout=1.5")
        assert (done.code, complete()) == (0, [])
    finally:
        answers.set()
    assert f"the last checkpoint is on its way to {URL}; waiting" in (run / "train.log").read_text()
    assert "it did not arrive within checkpoint.upload_timeout=1.5 s" in events(run, "failed_upload")[-1]["message"]


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (FileNotFoundError("The specified bucket does not exist"), MISUSED, "it is not there"),
        (PermissionError("The AWS Access Key Id does not exist"), MISUSED, "the store refuses it"),
        (TimeoutError("timed out"), FAILED, "the store does not answer as it should (timed out)"),
    ],
)
def test_a_store_that_cannot_be_written_is_said_before_the_first_step(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: int,
    said: str,
) -> None:  # fmt: skip
    def pipe_file(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}/run", *SHORT)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert done.err.startswith(f"error: checkpoint.upload_to={URL}: cannot write {URL}/.write-test: {said}")
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_no_url_is_refused(tiny_pretrain: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, "checkpoint.upload_to=bucket/run")
    assert done.code == MISUSED
    assert "upload_to=bucket/run is no URL; expected one like s3://bucket/run, or file:///mnt/run" in done.err


# Shards in a store


@pytest.fixture
def shards(tiny_pretrain: Path) -> str:
    """The URL of the golden run's shards in a store."""
    folder = load_config(PretrainConfig, tiny_pretrain).data.shards
    for path in folder.rglob("*.*"):
        storage.upload(path, f"memory://shards/{path.relative_to(folder).as_posix()}")
    return "memory://shards"


@pytest.mark.slow
def test_shards_in_a_store_train_to_the_bit_as_those_on_the_disk(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, whole: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched whole into the cache, or read by ranges where they do not fit."""
    monkeypatch.setenv("MOE_LM_CACHE", str(tmp_path / "cache"))
    command = ("pretrain", tiny_pretrain, *SHORT, "checkpoint.upload_to=null", f"data.shards={shards}")
    for run, setting in (
        (tmp_path / "ranges", "data.cache_bytes=1"),
        (tmp_path / "kept", "data.cache_bytes=1000000000"),
    ):
        assert moe_lm(*command, f"run_dir={run}", setting).code == 0
        assert_same_run(whole, run)
        assert (tmp_path / "cache").exists() == (run.name == "kept")
    assert "shards: memory://shards\n" in (tmp_path / "kept" / "config.yaml").read_text()


@pytest.mark.parametrize("cache_bytes", [1, 10**9])
def test_batches_of_shards_in_a_store_are_those_of_the_disk_and_each_manifest_is_read_once(
    tiny_pretrain: Path, tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    monkeypatch.setenv("MOE_LM_CACHE", str(tmp_path / "cache"))
    read, real = list[str](), storage.read_bytes

    def read_bytes(place: storage.Place) -> bytes:
        read.append(storage.text_of(place))
        return real(place)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    config = load_config(PretrainConfig, tiny_pretrain, [f"data.shards={shards}", f"data.cache_bytes={cache_bytes}"])
    here = load_config(PretrainConfig, tiny_pretrain)
    tokenizer, names = pretrain.load_tokenizer(config), [source.name for source in config.data.sources]
    splits, splits_here = (pretrain.open_for_training(one, tokenizer, Topology()) for one in (config, here))
    assert sorted(read) == sorted(f"{shards}/{name}/manifest.json" for name in names)
    batches, expected = pretrain.training_batches(config, splits[0]), pretrain.training_batches(here, splits_here[0])
    rows = range(config.train.global_batch_size)
    for step in range(3):
        assert torch.equal(batches.batch(step, rows).input_ids, expected.batch(step, rows).input_ids)
    assert (tmp_path / "cache").exists() == (cache_bytes > 1)
    said = [line for line in data_lines(names, *splits, None, config) if "data.cache_bytes" in line]
    size = sum(file.size for file in storage.find(shards) if file.name.endswith(".bin"))
    told = f"{shards} has {size:,} bytes, more than data.cache_bytes=1: windows are read there one by one"
    assert [told in line for line in said] == ([True] if cache_bytes == 1 else [])


def test_a_shard_that_is_cut_in_its_store_and_one_to_be_written_there_are_refused(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, shards: str
) -> None:
    (damaged,) = storage.glob(f"{shards}/*/train-00000.bin")[:1]
    storage.write_bytes(damaged.url, storage.read_bytes(damaged.url)[:-2])
    done = moe_lm("pretrain", tiny_pretrain, *SHORT, f"data.shards={shards}", f"run_dir={tmp_path}/other")
    assert done.code == MISUSED
    assert f"{damaged.name.rpartition('/')[2]} has {damaged.size - 2} bytes, expected {damaged.size}" in done.err
    done = moe_lm("prepare", tiny_pretrain, f"data.shards={shards}")
    said = "give a folder as data.shards, since what is in memory:// ends with its process"
    assert (done.code, said in done.err, done.err.count("\n")) == (MISUSED, True, 1)
    done = moe_lm("pretrain", tiny_pretrain, *SHORT, "data.shards=memory://nothing", f"run_dir={tmp_path}/other")
    assert (done.code, f"there are no shards in memory://nothing/text yet; {said}" in done.err) == (MISUSED, True)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://bucket/shards", ", as with: aws s3 sync shards s3://bucket/shards"),
        ("gs://bucket/shards", ", as with: gcloud storage rsync --recursive shards gs://bucket/shards"),
        ("file:///mnt/shards", ", as with: cp -r shards/. /mnt/shards"),
        ("hf://datasets/me/mine", ""),
    ],
)
def test_shards_are_copied_into_a_store_with_its_own_command(place: str, said: str) -> None:
    assert into_store(Path(place)) == f"prepare with data.shards=shards, then copy that folder there{said}"


def test_a_tokenizer_that_is_lost_with_the_machine_is_in_the_bucket(tiny_pretrain: Path, tmp_path: Path) -> None:
    settings = (f"data.tokenizer={tmp_path}/lost", f"run_dir={tmp_path}/run", f"checkpoint.upload_to={URL}")
    with pytest.raises(UsageError, match=f"have the tokenizer: .* checkpoint fetch {URL} {tmp_path}/run$"):
        pretrain.load_tokenizer(load_config(PretrainConfig, tiny_pretrain, settings))
