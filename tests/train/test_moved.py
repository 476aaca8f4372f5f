"""Run folders that were moved, and are looked at from another working folder: a path is no setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_lm.config.moved import as_of
from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.prepare import prepare
from tests.processes import ROOT, metrics
from tests.runs import assert_same_run, last_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]


@pytest.fixture
def here(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `runs/it/pretrain`, its shards and its tokenizer; the working folder while they were made."""
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(load_config(PretrainConfig, tiny_pretrain).data.shards, "runs/it/shards")
    shutil.copytree(ROOT / "tokenizer" / "tiny", "runs/it/tokenizer")
    places = ("run_dir=runs/it/pretrain", "data.shards=runs/it/shards", "data.tokenizer=runs/it/tokenizer")
    settings = ("train.steps=4", "checkpoint.every=2", "train.eval_batches=1")
    assert moe_lm("pretrain", tiny_pretrain, *places, *settings).code == 0
    return tmp_path / "here"


def moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `it` under another name in another working folder, without the last checkpoint of its run."""
    there = here.with_name("there")
    there.mkdir()
    (here / "runs" / "it").rename(there / "that")
    monkeypatch.chdir(there)
    shutil.rmtree("that/pretrain/checkpoints/step-00000004")
    return there


def test_a_moved_run_goes_on_and_is_evaluated_where_it_is_now(
    here: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree("runs/it", here / "whole")
    moved(here, monkeypatch)
    done = moe_lm("pretrain", "that/pretrain/config.yaml")
    assert (done.code, "going on after step 2 of 4" in done.out) == (0, True), done
    assert_same_run(whole / "pretrain", Path("that/pretrain"))
    assert not Path("runs").exists()
    config = load_config(PretrainConfig, Path("that/pretrain/config.yaml"))
    assert (config.run_dir, config.data.shards) == (Path("that/pretrain"), Path("that/shards"))
    done = moe_lm("eval", "that/pretrain")
    assert (done.code, "held-out text of that/pretrain" in done.out) == (0, True), done
    # The checkpoint has its own copy of the tokenizer, and a finished run says what to type for more.
    shutil.rmtree("that/tokenizer")
    done = moe_lm("pretrain", "that/pretrain/config.yaml")
    assert (done.code, "this run is finished" in done.out) == (0, True), done


def test_a_copy_goes_on_by_itself_and_an_unmoved_run_from_any_folder(
    here: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the copy of a run are its own shards; what lies elsewhere is where it was."""
    shutil.copytree("runs/it", "copy")
    config = load_config(PretrainConfig, Path("copy/pretrain/config.yaml"))
    assert (config.run_dir, config.data.shards) == (Path("copy/pretrain"), Path("copy/shards"))
    shutil.copytree("runs/it/pretrain", "alone/in/a/folder")
    config = load_config(PretrainConfig, Path("alone/in/a/folder/config.yaml"))
    assert (config.run_dir, config.data.shards) == (Path("alone/in/a/folder"), Path("runs/it/shards"))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("here/runs/it/pretrain/checkpoints/step-00000004")
    assert moe_lm("pretrain", "here/runs/it/pretrain/config.yaml").code == 0
    assert metrics(Path("here/runs/it/pretrain"))[-1]["step"] == 4


def test_the_folder_of_a_project_is_no_run(tiny_pretrain: Path, tmp_path: Path) -> None:
    """Where someone keeps a `config.yaml` beside a folder `checkpoints` of something else."""
    values = yaml.safe_load(tiny_pretrain.read_text()) | {"run_dir": "runs/pp"}
    (tmp_path / "checkpoints" / "step-100").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(PretrainConfig, tmp_path / "config.yaml").run_dir == Path("runs/pp")


def test_other_data_at_the_new_place_is_refused(here: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may change, and the content may not."""
    there = moved(here, monkeypatch)
    shutil.move("that/shards", "kept")
    shutil.copytree("that/tokenizer", "tokenizer")
    where = ("data.shards=kept", "data.tokenizer=tokenizer")
    (there / "other.txt").write_text("Another text.\n\n" * 9000)
    sources = "data.sources=[{name: text, path: other.txt}]"
    prepare(load_config(PretrainConfig, Path("that/pretrain/config.yaml"), ["data.shards=that/shards", sources]).data)
    done = moe_lm("pretrain", "that/pretrain/config.yaml")
    assert (done.code, "the training data is other data" in done.err) == (2, True), done
    assert "data.shards" not in done.err
    done = moe_lm("eval", "that/pretrain")
    assert (done.code, done.out) == (2, "")
    assert "the shards in that/shards are other data than that/pretrain/checkpoints/step-00000002 was" in done.err
    done = moe_lm("pretrain", "that/pretrain/config.yaml", *where)
    assert (done.code, "going on after step 2 of 4" in done.out) == (0, True), done


def test_a_copy_and_an_average_are_evaluated_on_the_text_of_the_run_beside_other_shards(
    here: Path, moe_lm: MoeLm
) -> None:
    shutil.copytree("runs/it/pretrain", "other/copy")
    assert moe_lm("merge", "runs/it/pretrain", "--last", 2, "--run-dir", "other/average").code == 0
    kept = yaml.safe_load((last_checkpoint(Path("other/average")) / "config.yaml").read_text())
    assert (kept["run_dir"], kept["data"]["shards"]) == ("other/average", "runs/it/shards")
    Path("other.txt").write_text("Another text.\n\n" * 9000)
    settings = ("data.shards=other/shards", "data.sources=[{name: text, path: other.txt}]")
    prepare(load_config(PretrainConfig, Path("runs/it/pretrain/config.yaml"), settings).data)
    size = moe_lm("eval", "runs/it/pretrain").out.splitlines()[0].split(": ")[1]
    for run in ("other/copy", "other/average"):
        done = moe_lm("eval", run)
        assert (done.code, done.out.splitlines()[0]) == (0, f"held-out text of {run}: {size}"), done.err


def test_the_config_of_a_new_run_elsewhere_names_the_files_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    values = {"run_dir": "runs/it", "data": {"shards": "shards", "tokenizer": "Qwen/Qwen3-0.6B"}}
    found = as_of(values, tmp_path / "run")
    assert found == {
        "run_dir": str(tmp_path / "run"),
        "data": {"shards": str(tmp_path / "shards"), "tokenizer": "Qwen/Qwen3-0.6B"},
    }


def test_moved_adapters_find_their_base_and_their_conversations_beside_them(
    finetune_config: Path, pretrained: Path, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(pretrained, "base")
    shutil.copy(tmp_path / "chat.jsonl", "chat.jsonl")
    values = yaml.safe_load(finetune_config.read_text())
    values |= {"run_dir": "adapters", "start_from": "base", "lora": {"rank": 2}, "checkpoint": {"every": 1}}
    values["data"] |= {"train": ["chat.jsonl"], "validation": [{"path": "chat.jsonl"}], "validation_fraction": 0}
    values["train"] |= {"steps": 2}
    Path("ft.yaml").write_text(yaml.safe_dump(values))
    assert moe_lm("finetune", "ft.yaml").code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    done = moe_lm("sample", "there/adapters", "--prompt", "say", "--max-new-tokens", 2)
    assert (done.code, "2 tokens" in done.err) == (0, True), done
    shutil.rmtree("there/adapters/checkpoints/step-00000002")
    done = moe_lm("finetune", "there/adapters/config.yaml")
    assert (done.code, "going on after step 1 of 2" in done.out) == (0, True), done
    assert last_checkpoint(Path("there/adapters")).name == "step-00000002"
    Path("there/chat.jsonl").write_text(json.dumps({"prompt": "say", "completion": "other"}) + "\n")
    assert "the training data is other data" in moe_lm("finetune", "there/adapters/config.yaml").err
