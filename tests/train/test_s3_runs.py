"""The S3 test: runs that upload to a real S3 server on loopback are lost, go on elsewhere, and outlive the server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_lm.checkpoint import bucket, upload
from moe_lm.common import storage
from moe_lm.common.exits import FAILED, MISUSED
from tests.processes import ENVIRONMENT, events, wait_until
from tests.runs import assert_same_run

NEEDED = ("s3fs", "moto", "flask_cors")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in NEEDED),
        reason='needs an S3 server: pip install s3fs "moto[s3]" flask flask-cors',
    ),
]
MoeLm = Callable[..., Any]
URL = "s3://a-bucket/runs/mine"
SHORT = (
    "train.steps=4",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "train.eval_every=0",
    f"checkpoint.upload_to={URL}",
)


def is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An S3 server with one bucket, which this process finds in its environment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.05)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        wait_until(lambda: is_up(port), "the S3 server")
        from fsspec.core import url_to_fs

        store, _ = url_to_fs(URL)
        store.clear_instance_cache()
        url_to_fs(URL)[0].mkdir("a-bucket")
        yield process
        process.kill()
        store.clear_instance_cache()


def complete() -> list[int]:
    return sorted(step for step, item in bucket.stored(URL).items() if item.is_complete)


def test_a_run_is_lost_with_its_machine_and_goes_on_from_s3_to_the_bit_and_outlives_the_server(
    tiny_pretrain: Path,
    tmp_path: Path,
    moe_lm: MoeLm,
    server: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, whole, run = storage.upload, tmp_path / "whole", tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run}", *SHORT)
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={whole}", *SHORT, "checkpoint.upload_to=null").code == 0

    def cut(path: Path, place: storage.Place) -> None:
        if "step-00000004/optimizer" in str(place):
            raise ConnectionAbortedError("the machine is lost")
        real(path, place)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", cut)
        assert moe_lm(*command).code == 0
    assert complete() == [2]
    assert "manifest.json" in bucket.stored(URL)[4].files
    shutil.rmtree(run)
    done = moe_lm(*command)
    assert (done.code, "going on after step 2 of 4" in done.out) == (0, True)
    assert_same_run(whole, run)
    assert complete() == [2, 4]

    def die(path: Path, place: storage.Place) -> None:
        if "step-00000006/optimizer" in str(place):
            server.kill()
        real(path, place)

    monkeypatch.setattr(storage, "upload", die)
    longer = (*command, "train.steps=8", "train.schedule.name=constant", "checkpoint.allow_changes=true")
    done = moe_lm(*longer)
    assert (done.code, (run / "checkpoints" / "step-00000008").is_dir()) == (0, True)
    said = [line["message"] for line in events(run, "failed_upload")]
    assert said[0].startswith(f"warning: {URL} does not have the run as of step 6: cannot write {URL}/checkpoints/")
    assert "the store does not answer as it should (Could not connect" in said[-1]
    done = moe_lm(*longer)
    assert (done.code, done.err.count("\n")) == (FAILED, 1)
    assert done.err.startswith(f"error: checkpoint.upload_to={URL}: cannot write {URL}/.write-test: the store does not")


def test_a_bucket_that_is_not_there_and_no_credentials_are_said_before_the_first_step(
    tiny_pretrain: Path,
    tmp_path: Path,
    moe_lm: MoeLm,
    server: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}/run", *SHORT)
    done = moe_lm(*command, "checkpoint.upload_to=s3://no-bucket/run")
    assert (done.code, done.err.count("\n")) == (MISUSED, 1)
    assert "it is not there: The specified bucket does not exist; check the address" in done.err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    from fsspec.core import url_to_fs

    url_to_fs(URL)[0].clear_instance_cache()
    done = moe_lm(*command)
    assert (done.code, done.err.count("\n")) == (MISUSED, 1)
    assert "the store refuses it (Unable to locate credentials)" in done.err


@pytest.mark.slow
def test_each_rank_uploads_and_fetches_a_share(
    tiny_pretrain: Path, tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    """Two processes upload, lose their folder, and go on; one run of theirs knows no store."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe_lm"]
    whole, run = tmp_path / "whole", tmp_path / "run"

    def train(folder: Path, *settings: str) -> str:
        command = [*launch, "pretrain", str(tiny_pretrain), f"run_dir={folder}", *SHORT, *settings]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    train(whole, "checkpoint.upload_to=null")
    train(run)
    assert complete() == [2, 4]
    storage.remove([f"{bucket.stored_at(URL, 4).url}/COMPLETE"])
    shutil.rmtree(run)
    assert "going on after step 2 of 4" in train(run)
    assert_same_run(whole, run)
    assert complete() == [2, 4]
