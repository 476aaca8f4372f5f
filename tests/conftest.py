"""Fixtures for every test."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import yaml
from hypothesis import settings

from moe_lm.config.reading import dump_config, load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.processes import ENVIRONMENT, ROOT, one_thread_here, start_ranks

if TYPE_CHECKING:
    from moe_lm.data.batches import BatchSource
    from moe_lm.model.transformer import LanguageModel

settings.register_profile("busy", settings.default, deadline=None)  # other tests may run beside this one
settings.load_profile("busy")
SaveRun = Callable[..., Path]
MoeLm = Callable[..., "Done"]
WORDS = "apple river stone cloud paper green seven table horse music window garden silver orange".split()


def pytest_configure() -> None:
    """Let the tests and the processes they start hear Ctrl-C and a closed terminal, under `nohup` and `&` too.

    A started process inherits what is ignored here, but not a handler.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # the tests themselves go on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that start many processes, so that two workers that share the files end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("launch", "distributed", "verify"))


@pytest.fixture(autouse=True)
def side_by_side(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let workers test side by side, but nothing beside a test that is marked `alone`."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    alone = request.node.get_closest_marker("alone") is not None
    with (tmp_path_factory.getbasetemp().parent / "alone.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the project. Where it is absent, the test is skipped."""
    folder = ROOT / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 1024 ids, trained on the Python standard library."""
    return Tokenizer.load(ROOT / "tokenizer" / "tiny")


@pytest.fixture(scope="session")
def tiny_pretrain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of the golden run, with its shards written; a test gives it a run_dir and fewer steps."""
    from moe_lm.data.prepare import prepare
    from tests.golden.make import golden_config

    folder = tmp_path_factory.mktemp("tiny")
    config = golden_config(folder)
    prepare(config.data)
    file = folder / "tiny.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pretrained(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 30 steps."""
    from moe_lm.train import pretrain

    run_dir = tmp_path_factory.mktemp("pretrained")
    with one_thread_here():
        pretrain.run(load_config(PretrainConfig, tiny_pretrain, [f"run_dir={run_dir}", "train.steps=30"]))
    return run_dir


@pytest.fixture
def finetune_config(pretrained: Path, tmp_path: Path) -> Path:
    """A fine-tuning config with 150 similar conversations, of both kinds of rows, a fifth held out."""
    draw, lines = random.Random(1), []
    for number in range(150):
        first, second = draw.choice(WORDS), draw.choice(WORDS)
        asked, answer = f"say {first} then {second}", f"you said {first} and {second}."
        pair = {"instruction": asked, "input": "", "output": answer}
        messages = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        lines.append(json.dumps(pair if number % 2 else messages) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    values = {
        "run_dir": str(tmp_path / "run"),
        "start_from": str(pretrained),
        "data": {"train": [str(tmp_path / "chat.jsonl")], "validation_fraction": 0.2, "sequence_length": 64},
        "train": {
            "steps": 12, "global_batch_size": 8, "precision": "float32", "optimizer": {"lr": 0.01},
            "schedule": {"warmup_steps": 2},
        },
        "parallel": {"device": "cpu"},
    }  # fmt: skip
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes on one thread."""
    with one_thread_here():
        yield


class Done(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def moe_lm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> MoeLm:
    """Runs `moe-lm` with these arguments in this process."""
    from moe_lm.cli.main import main

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["moe-lm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def start_moe_lm() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `moe-lm` with these arguments, and environment variables by keyword, in a process of its own."""
    started = []

    def start(*arguments: object, **environment: object) -> subprocess.Popen[str]:
        variables = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_lm", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables | {name: str(value) for name, value in environment.items()},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run_ranks(start_moe_lm: Callable[..., subprocess.Popen[str]]) -> Callable[..., list[Done]]:
    """Runs `moe-lm` with these arguments in this many processes, as torchrun would; returns how each of them ended."""

    def run(world_size: int, *arguments: object) -> list[Done]:
        ranks = start_ranks(start_moe_lm, world_size, *arguments)
        outputs = [rank.communicate(timeout=180) for rank in ranks]
        return [Done(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]

    return run


@pytest.fixture
def ragged() -> BatchSource:
    """Packed documents of unequal length with padding; some rows have few targets or none."""
    from moe_lm.tools.verify.documents import Documents

    return Documents(seed=1)


@pytest.fixture
def save_run(tmp_path: Path, tiny_tokenizer: Tokenizer) -> SaveRun:
    """Makes a run folder with one checkpoint of a model, as training leaves it."""
    from tests.tiny import write_run

    def save(model: LanguageModel, config: str = "") -> Path:
        return write_run(tmp_path / "run", model, tiny_tokenizer, config)

    return save


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
