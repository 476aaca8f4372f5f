"""A run and its data: the order it began with, other data under the same path, damaged shards."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config import training
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import Batch, PackedBatches
from moe_lm.data.order import Mixture
from moe_lm.data.prepare import prepare
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.topology import Topology
from moe_lm.parallel.watch import Watchdog
from moe_lm.train import pretrain, run
from tests.processes import events, free_port, metrics
from tests.runs import assert_same_run, figures, last_checkpoint
from tests.train.test_damaged_runs import flip_a_byte
from tests.train.test_pretrain import SHORT, held_out_batches

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]


def test_a_run_keeps_the_order_of_its_sources_that_it_began_with(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun before the epochs of several sources were exact goes on as it would have, to the bit."""
    path = load_config(PretrainConfig, tiny_pretrain).data.sources[0].path
    sources = f"data.sources=[{{name: one, path: {path}}}, {{name: two, path: {path}, weight: 3}}]"
    command = (tiny_pretrain, sources, f"data.shards={tmp_path / 'shards'}", "checkpoint.every=6", *SHORT)
    begun, parted, anew = (tmp_path / name for name in ("begun", "parted", "anew"))
    assert moe_lm("prepare", *command).code == 0
    with monkeypatch.context() as before:
        before.setattr(Mixture, "__init__", partialmethod(Mixture.__init__, exact_epochs=False))
        assert moe_lm("pretrain", *command, f"run_dir={begun}").code == 0
    shutil.copytree(begun, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000012")
    for folder, message in ((parted, "going on after step 6 of 12"), (anew, "pretrain 12/12")):
        done = moe_lm("pretrain", *command, f"run_dir={folder}")
        assert (done.code, message in done.out) == (0, True), done
    assert_same_run(begun, parted)
    assert figures(begun) != figures(anew)
    sums = [(last_checkpoint(folder) / "data.sha256").read_text() for folder in (begun, parted, anew)]
    assert sums[0] == sums[1] != sums[2]


def test_other_data_under_the_same_path_is_refused(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    """The permutation of its windows would be another one: tokens would be repeated and skipped."""
    source = load_config(PretrainConfig, tiny_pretrain).data.sources[0]
    text = Path(source.path or "").read_text(encoding="utf-8")
    (tmp_path / Path(source.path or "").name).write_text(text, encoding="utf-8")
    sources = [source.model_dump(mode="json") | {"path": str(tmp_path / Path(source.path or "").name)}]
    overrides = [f"data.sources={json.dumps(sources)}", f"data.shards={tmp_path / 'shards'}"]
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *overrides, *SHORT)
    prepare(load_config(PretrainConfig, tiny_pretrain, overrides).data)
    assert moe_lm(*command).code == 0
    assert moe_lm(*command).code == 0
    (tmp_path / Path(source.path or "").name).write_text(text[: len(text) // 2], encoding="utf-8")
    shutil.rmtree(tmp_path / "shards")
    prepare(load_config(PretrainConfig, tiny_pretrain, overrides).data)
    done = moe_lm(*command)
    assert done.code == 2
    assert "the training data is other data" in done.err


def test_a_corrupt_shard_is_named_before_anything_is_built(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks have met, as each reads a share, and the watchdog bears with what takes long."""
    done_so_far: list[str] = []
    join, at, look = run.join_ranks, Watchdog.at, pretrain.damages

    def noted(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: (done_so_far.append(name), action(*args, **named))[1]

    monkeypatch.setattr(run, "join_ranks", noted("met", join))
    monkeypatch.setattr(pretrain, "damages", noted("looked", look))
    monkeypatch.setattr(Watchdog, "at", lambda self, phase: (done_so_far.append(phase), at(self, phase)))
    config = load_config(PretrainConfig, tiny_pretrain)
    shutil.copytree(config.data.shards, tmp_path / "shards")
    flip_a_byte(tmp_path / "shards" / "text" / "train-00000.bin")
    done = moe_lm(
        "pretrain",
        tiny_pretrain,
        f"data.shards={tmp_path / 'shards'}",
        f"run_dir={tmp_path / 'run'}",
        "data.verify=true",
    )
    assert done.code != 0
    assert str(tmp_path / "shards" / "text" / "train-00000.bin") in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
    assert done_so_far == ["met", "verifying", "looked", ""]


def test_a_host_that_does_not_see_the_shards_is_named(
    tiny_pretrain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two hosts, which are threads, has a folder of its own under `data.shards`."""
    monkeypatch.setattr("socket.gethostname", lambda: threading.current_thread().name)
    there = load_config(PretrainConfig, tiny_pretrain).data.shards
    shutil.copytree(there, tmp_path / "copied")
    manifest = tmp_path / "copied" / "text" / "manifest.json"

    def said_with(shards: Path) -> set[str]:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))

        def be_host(rank: int) -> str:
            threading.current_thread().name = f"host-{rank}"
            config = load_config(PretrainConfig, tiny_pretrain, [f"data.shards={shards if rank else there}"])
            meeting = Meeting(Topology(rank, 2))
            try:
                pretrain.check_shared(config, meeting)
            except UsageError as error:
                return str(error)
            finally:
                meeting._linger()
            return "agreed"

        with ThreadPoolExecutor(2) as hosts:
            return set(hosts.map(be_host, range(2)))

    assert said_with(tmp_path / "copied") == {"agreed"}
    [said] = said_with(tmp_path / "nowhere")
    lacks = f"source text=no shards in {tmp_path / 'nowhere' / 'text'}"
    assert said.startswith(f"rank 1 on host-1 has {lacks}, rank 0 on host-0 has manifest ")
    assert "data.shards must be a folder that all hosts share" in said
    manifest.write_text(manifest.read_text() + " ")
    [said] = said_with(tmp_path / "copied")
    assert said.startswith("rank 1 on host-1 has source text=manifest ")


def test_a_run_goes_on_without_a_damaged_shard_where_that_is_chosen(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of tokens is said at every start; the shard that is back is other data (FAULTS row 26)."""
    monkeypatch.setattr("moe_lm.text.pieces.SMALLEST", 20_000)
    places = (f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}", "data.verify=true")
    command = (tiny_pretrain, *places, *SHORT)
    assert moe_lm("prepare", *command).code == 0
    shard = tmp_path / "shards" / "text" / "train-00001.bin"
    flip_a_byte(shard)
    done = moe_lm("pretrain", *command)
    assert (done.code, f"shard {shard} is corrupt" in done.err, "data.on_damage=leave_out" in done.err) == (2, 1, 1)
    going = ("pretrain", *command, "data.on_damage=leave_out", "checkpoint.every=6")
    for _ in range(2):
        done = moe_lm(*going)
        assert (done.code, "warning: 1 of the " in done.out) == (0, True)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    said = events(tmp_path / "run", "data_left_out")
    assert [(event["step"], event["source"], event["shards"]) for event in said] == [
        (0, "text", ["train-00001"]), (6, "text", ["train-00001"]),
    ]  # fmt: skip
    assert 0 < said[0]["share"] < 0.5
    flip_a_byte(shard)
    done = moe_lm(*going)
    assert (done.code, "the training data is other data" in done.err) == (2, True)


def test_a_shard_that_is_cut_during_training_is_named(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was SIGBUS, without a word."""
    shutil.copytree(load_config(PretrainConfig, tiny_pretrain).data.shards, tmp_path / "shards")
    shard, batch = tmp_path / "shards" / "text" / "train-00000.bin", PackedBatches.batch

    def cutting(self: PackedBatches, step: int, rows: range) -> Batch:
        if step == 5:
            os.truncate(shard, 100)
        return batch(self, step, rows)

    monkeypatch.setattr(PackedBatches, "batch", cutting)
    folders = (f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}")
    done = moe_lm("pretrain", tiny_pretrain, *folders, *SHORT)
    assert done.code == 1
    assert f"shard {shard} ends before byte" in done.err
    assert len(metrics(tmp_path / "run")) == 5


def test_an_evaluation_reads_so_many_tokens_of_a_large_split_unless_the_config_says_more(
    tiny_pretrain: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run says how many those are."""
    monkeypatch.setattr(training, "EVALUATED", 2 * 8 * 64 + 1)
    config = load_config(PretrainConfig, tiny_pretrain, ["train.eval_batches=null"])
    assert sum(len(batch.input_ids) for batch in held_out_batches(config)) == 16
    dry = moe_lm("pretrain", tiny_pretrain, "train.eval_batches=null", "--dry-run")
    assert "held out (" in dry.out
    assert "of which an evaluation reads 1,024 (train.eval_batches)" in " ".join(dry.out.split())
