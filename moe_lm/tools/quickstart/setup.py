"""What a quickstart works with: its folder, its text, its time, and the config of its pretraining."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from moe_lm.checkpoint.checkpoint import complete_checkpoints
from moe_lm.common.errors import UsageError
from moe_lm.common.files import not_writable, whole_file
from moe_lm.config.data import SourceConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig
from moe_lm.kernels.device import compiling_needs, pick_device
from moe_lm.text.sources import Report, read_documents, source_files
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.sizes import Sizes, piece_bytes, text_bytes

PROJECT = Path(__file__).parents[3]
CORPUS = "corpus"  # the name of the source, and so of its shards
ORIGIN = "corpus.txt"  # the file that says which text a folder is made of
SOURCE = "source.json"  # the text as it is read in all walks in the folder, and as it was when they began
STDLIB = "Python's standard library"
SUMMARY = "summary.txt"  # what a finished walk says
BYTES_A_MINUTE, LEAST_BYTES = 3e6, 5e5  # of text to read: more than two cores can train on in a minute
COMPILED_MINUTES = 3.0  # compiling takes longer than it saves in shorter walks

ConfigT = TypeVar("ConfigT", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True)
class Setup:
    """The run's folder, the text to train on, the minutes that it may take, and the terminal."""

    run_dir: Path
    corpus: Path | None  # None: the standard library
    minutes: float
    console: Console
    started: float  # on the monotonic clock, less the seconds of earlier starts

    @property
    def source(self) -> dict[str, Any]:
        """The source in configs, as the folder keeps it."""
        kept: dict[str, Any] = json.loads((self.run_dir / SOURCE).read_text(encoding="utf-8"))["source"]
        return kept

    def new_source(self) -> dict[str, Any]:
        """At most as much text as can be trained on in time, in pieces of which some can be held out."""
        most = max(LEAST_BYTES, BYTES_A_MINUTE * self.minutes)
        if self.corpus is None:
            whole = SourceConfig(name=CORPUS, stdlib=True)
        else:
            whole = SourceConfig(name=CORPUS, path=str(self.corpus))
        source = whole.model_dump(exclude_defaults=True)
        if text_bytes(whole) > most and not torch.cuda.is_available():
            source["max_bytes"] = int(most)
        if self.corpus is not None:
            source["piece_bytes"] = piece_bytes(SourceConfig(**source))
        return source

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.started)

    @property
    def is_short(self) -> bool:
        """Whether time is so dear that evaluations take the shorter way."""
        return self.minutes < COMPILED_MINUTES

    @property
    def tokenizer(self) -> Path:
        return self.run_dir / "tokenizer"

    @property
    def pretrain_dir(self) -> Path:
        return self.run_dir / "pretrain"

    @property
    def finetune_dir(self) -> Path:
        return self.run_dir / "finetune"

    def chat_file(self, split: str) -> Path:
        return self.run_dir / "chat" / f"{split}.jsonl"


def default_folder(corpus: Path | None) -> Path:
    """`runs/quickstart`, or the folder in `runs` named after the text: `runs/my` for `my.txt`."""
    if corpus is None:
        return Path("runs/quickstart")
    words = [part for part in corpus.expanduser().parts if not glob.has_magic(part)]
    name = Path(words[-1] if words else "").name.partition(".")[0]
    return Path("runs") / (re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "text")


def claim(setup: Setup) -> None:
    """Check the text, and take the folder for it.

    Raises UsageError for no text, and for a folder that cannot be written or is of another text.
    """
    if setup.corpus is not None:
        next(read_documents(SourceConfig(name=CORPUS, path=str(setup.corpus)), Report()))
    is_known = (setup.run_dir / SOURCE).exists() or (setup.pretrain_dir / "config.yaml").exists()
    source = {} if is_known else setup.new_source()
    path, text = setup.run_dir / ORIGIN, STDLIB if setup.corpus is None else str(setup.corpus.absolute())
    try:
        setup.run_dir.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if before is None and not any(setup.run_dir.iterdir()):
            write_whole(path, text)
            before = text
    except OSError as error:
        raise not_writable(f"the run folder {setup.run_dir}", error) from error
    if before not in (None, text):
        raise UsageError(f"{setup.run_dir} is of {before}; give another --run-dir for {text}")
    if before is None and not (setup.run_dir / "seconds.json").exists():
        raise UsageError(f"{setup.run_dir} holds something else; give another --run-dir")
    keep_source(setup, source)


def keep_source(setup: Setup, source: dict[str, Any]) -> None:
    """Keep what is read, whatever the minutes of later calls. Raises UsageError if the text is not what it was."""
    path, listing = setup.run_dir / SOURCE, ""
    if setup.corpus is not None:
        files = source_files(SourceConfig(name=CORPUS, path=str(setup.corpus)))
        names = "\n".join(f"{name} {file.stat().st_size}" for name, file in files)
        listing = hashlib.sha256(names.encode()).hexdigest()
    if not path.exists():
        if not source:  # a folder of an older version
            source = saved_config(setup).data.sources[0].model_dump(mode="json", exclude_defaults=True)
        write_whole(path, json.dumps({"source": source, "files": listing}))
    elif json.loads(path.read_text(encoding="utf-8"))["files"] != listing:
        raise UsageError(
            f"{setup.corpus} has changed since {setup.run_dir} was made of it; give another --run-dir, or delete "
            f"{setup.run_dir} to begin anew"
        )


def write_whole(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def is_finished(setup: Setup) -> bool:
    return (setup.run_dir / SUMMARY).exists() and done_steps(setup) >= saved_config(setup).train.steps


def done_steps(setup: Setup) -> int:
    return max(complete_checkpoints(setup.pretrain_dir / "checkpoints"), default=0)


def saved_config(setup: Setup) -> PretrainConfig:
    return load_config(PretrainConfig, setup.pretrain_dir / "config.yaml")


def new_config(setup: Setup) -> PretrainConfig:
    """The config of a run that begins; the steps are the most that are worth while."""
    settings: dict[str, Any] = {
        "run_dir": setup.pretrain_dir,
        "data.tokenizer": setup.tokenizer,
        "data.shards": setup.run_dir / "shards",
        "data.sources": [setup.source],
        "data.workers": 1 if setup.source.get("max_bytes") or setup.corpus is not None else None,
        "train.global_batch_size": 4 if setup.minutes < 1 else 8,
    }
    if setup.minutes >= COMPILED_MINUTES or torch.cuda.is_available():
        del settings["train.global_batch_size"]
    if setup.corpus is not None and not torch.cuda.is_available():
        sizes = Sizes.of(SourceConfig(**setup.source))
        settings |= {f"model.{key}": value for key, value in sizes.model.items()}
        settings["model.vocab_size"] = Tokenizer.load(setup.tokenizer).vocab_size
    config = load_config(PretrainConfig, preset(), overrides(settings))
    return compiled_if_possible(setup, config)


def preset_steps(config: PretrainConfig) -> int:
    """The steps of the preset, with as many tokens where batches are smaller."""
    train = load_config(PretrainConfig, preset()).train
    return train.steps * train.global_batch_size // config.train.global_batch_size


def preset() -> Path:
    """The quickstart's own config, for the device that is here."""
    name = "quickstart-cuda" if torch.cuda.is_available() else "quickstart"
    return PROJECT / f"configs/pretrain/{name}.yaml"


def with_train(config: ConfigT, **changes: Any) -> ConfigT:
    """The config with other settings of training."""
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def compiled_if_possible(setup: Setup, config: ConfigT) -> ConfigT:
    """The config, without `torch.compile` in a short walk and on a machine that cannot run it."""
    if setup.minutes < COMPILED_MINUTES and not torch.cuda.is_available():
        return with_train(config, compile=False)
    needed = compiling_needs(pick_device(config.parallel.device))
    if needed is None:
        return config
    setup.console.print(f"training without torch.compile, which needs {needed}")
    return with_train(config, compile=False)


def overrides(settings: dict[str, Any]) -> list[str]:
    """`key=value` for every setting; JSON is YAML, whatever a path contains."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


@contextmanager
def stage(setup: Setup, name: str) -> Iterator[None]:
    """Print the stage's title, and add its seconds to those of earlier runs, even if it is stopped."""
    setup.console.rule(name)
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = read_seconds(setup.run_dir)
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 2)
        write_whole(setup.run_dir / "seconds.json", json.dumps(seconds))


def read_seconds(run_dir: Path) -> dict[str, float]:
    """The seconds that each stage has taken, over all starts."""
    file = run_dir / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
