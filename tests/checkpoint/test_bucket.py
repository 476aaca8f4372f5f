"""The uploader and the fetch beside a store, each as one rank of several sees it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from moe_lm.checkpoint import bucket, checkpoint, upload, write
from moe_lm.checkpoint.checkpoint import COMPLETE, MANIFEST
from moe_lm.checkpoint.upload import Uploader
from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.common.storage import StorageError
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.process_group import Ranks
from tests.processes import wait_until

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.001)
    yield
    MemoryFileSystem.store.clear()


def one_of(rank: int, size: int) -> Any:
    """A rank that hears of the others only through the store and the run folder."""
    return SimpleNamespace(
        rank=rank, size=size, first=lambda action, expected: action(), each=lambda action, expected: [action()]
    )


def saved(checkpoints: Path, step: int, value: float = 1) -> Path:
    return write.save(checkpoints, step, {"model.a": torch.full((4,), value)}, {"trainer.json": "{}", "x.txt": "x"})


def put(folder: Path, *names: str) -> None:
    """Upload files of a checkpoint, as other ranks do."""
    for name in names:
        storage.upload(folder / name, f"{URL}/checkpoints/{folder.name}/{name}")


def uploader(checkpoints: Path, rank: int, size: int) -> Uploader:
    config = CheckpointConfig(upload_to=URL, upload_timeout=5)
    return Uploader(checkpoints, config, one_of(rank, size))


def test_a_fetch_into_folders_that_hosts_do_not_share_leaves_no_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "elsewhere", 5)
    put(folder, *json.loads((folder / MANIFEST).read_text()), MANIFEST, COMPLETE)
    with pytest.raises(MoeLmError, match="is only on the host that wrote it; set run_dir to a folder that all hosts"):
        bucket.bring_back(tmp_path / "run/checkpoints", URL, one_of(0, 2))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_disk_that_is_full_of_logs_is_said_to_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = saved(tmp_path / "elsewhere", 5), storage.fetch
    put(folder, *json.loads((folder / MANIFEST).read_text()), MANIFEST, COMPLETE)

    def fetch(place: str, path: Path, *entry: Any) -> None:
        if path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(place, path, *entry)

    monkeypatch.setattr(storage, "fetch", fetch)
    with pytest.raises(MoeLmError, match="No space left on device; make room there"):
        bucket.bring_back(tmp_path / "run/checkpoints", URL, Ranks())


def test_a_rank_asks_no_more_for_checkpoints_that_rank_0_has_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = list[str](), storage.read_bytes

    def read_bytes(place: str) -> bytes:
        asked.append(place)
        return real(place)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    old, new = (saved(tmp_path, step) for step in (1, 2))
    put(new, MANIFEST)
    one = uploader(tmp_path, 1, 2)
    one.add(old)
    wait_until(lambda: len(asked) > 2, "requests for step 1")
    one.add(new)
    wait_until(lambda: [done.step for done in one.outcomes()] == [2], "step 2")
    wait_until(lambda: one.under_way is None, "its end")
    assert one._pending == []
    assert len(json.loads((new / MANIFEST).read_text())) // 2 == len(bucket.stored(URL)[2].files) - 1  # its share


def test_a_rank_waits_longer_and_longer_for_a_checkpoint_that_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "MOST_POLL_SECONDS", 0.01)
    one = uploader(tmp_path, 1, 2)
    one.add(saved(tmp_path, 1))
    wait_until(lambda: one._pause == 0.01, "the longest wait")
    put(tmp_path / "step-00000001", MANIFEST)
    wait_until(lambda: [done.step for done in one.outcomes()] == [1], "step 1")


def test_what_a_run_went_back_from_is_deleted_when_the_store_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (8, 9, 10):
        put(saved(tmp_path, step), MANIFEST, COMPLETE)
    real, tries, answers = bucket.drop_after, list[int](), list[bool]()

    def drop_after(url: str, step: int) -> None:
        tries.append(step)
        if not answers:
            raise StorageError("no answer")
        real(url, step)

    monkeypatch.setattr(bucket, "drop_after", drop_after)
    monkeypatch.setattr(upload, "MOST_POLL_SECONDS", 0.01)
    one = uploader(tmp_path, 0, 1)
    one.go_back_to(8)
    wait_until(lambda: len(tries) > 2, "attempts")
    (told,) = one.outcomes()
    one.go_back_to(9)  # of which 8 is the earlier
    wait_until(lambda: one.outcomes() != [], "another sentence")
    assert (told.step, set(tries)) == (8, {8})
    assert "no answer" in str(told.error)
    assert "a start elsewhere would go on from them" in str(told.error)
    answers.append(True)
    wait_until(lambda: list(bucket.stored(URL)) == [8], "the deletion")
    wait_until(lambda: one._is_over(float("inf")), "the end")
    assert one.outcomes() == []


def test_an_upload_that_was_cut_goes_on_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, one = MemoryFileSystem.put_file, uploader(tmp_path, 0, 1)

    def put_file(store: MemoryFileSystem, path: str, there: str, **how: Any) -> None:
        if "model" in there:
            raise ConnectionResetError("reset by peer")
        real(store, path, there, **how)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", put_file)
        one.add(saved(tmp_path, 8))
        wait_until(lambda: "reset by peer" in str(one.outcomes()), "the failure")
        assert not bucket.stored(URL)[8].is_complete
    one.add(saved(tmp_path, 9))
    wait_until(lambda: [done.step for done in one.outcomes()] == [9], "step 9")
    wait_until(lambda: list(bucket.stored(URL)) == [9], "the end of the older one")
    assert bucket.stored(URL)[9].is_complete


@pytest.mark.parametrize("seen", ["gone", "another"])
def test_a_share_of_a_step_that_is_saved_again_meanwhile_is_uploaded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """Rank 1 puts a file of the first attempt after rank 0 has begun the second, whose files have the same sizes."""
    folder, real, again = saved(tmp_path, 8, 1), bucket.upload_files, list[bool]()
    put(folder, MANIFEST)
    share = list(checkpoint.read_manifest(folder))[1::2]

    def upload_files(item: Any, names: Any, there: Path) -> None:
        if not again:
            again.append(True)
            real(item, share, there)
            saved(tmp_path, 8, 2)
            if seen == "gone":
                storage.remove([f"{URL}/checkpoints/step-00000008/{MANIFEST}"])
            else:
                put(folder, MANIFEST)
            return
        real(item, names, there)

    monkeypatch.setattr(bucket, "upload_files", upload_files)
    one = uploader(tmp_path, 1, 2)
    one.add(folder)
    if seen == "gone":
        wait_until(lambda: one.under_way is None and bool(again), "the first attempt")
        put(folder, MANIFEST)
    wait_until(lambda: any(done.error is None for done in one.outcomes()), "the second")
    for name in share:
        assert storage.read_bytes(f"{URL}/checkpoints/step-00000008/{name}") == (folder / name).read_bytes()
    assert any("model" in name for name in share)
