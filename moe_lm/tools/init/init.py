"""`moe-lm init`: writes a commented config, sized to the text and the machine where both are known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import torch

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.read import read_model_config
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import whole_file
from moe_lm.common.process import cores, to_type
from moe_lm.config.data import SourceConfig
from moe_lm.config.reading import build_config
from moe_lm.config.run import PretrainConfig
from moe_lm.data.batches import Batch, pack
from moe_lm.kernels.device import pick_device
from moe_lm.model.size import count_parameters
from moe_lm.text.sources import Report, read_documents
from moe_lm.tools.init.commented import commented
from moe_lm.tools.init.kinds import KINDS, Kind, Values, Wanted
from moe_lm.tools.sizes import COUNTED, EPOCHS, HELD_OUT, SHAPES, Sizes, held_out_share, piece_bytes
from moe_lm.train import pretrain
from moe_lm.train.display import format_seconds

MINUTES = 20.0
BYTES_A_TOKEN = 3.0  # of text, about, before there is a tokenizer
DATA = {"finetune": "chat.jsonl", "lora": "chat.jsonl", "dpo": "pairs.jsonl"}  # stand-ins; else texts/*.txt


def init(
    text: str | None, kind: str, start: Path | None, out: Path | None, minutes: float | None, force: bool
) -> Iterator[str]:
    """Write the config of a kind, and for a pretraining the recipe of its tokenizer; yields what to say.

    Raises UsageError for a text that cannot be read, a start that is no run and a file that is there already.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(text or "").stem).strip("-*") or "mine"
    data = text or DATA.get(kind, "texts/*.txt")
    if text is not None and kind in ("pretrain", "tokenizer", "continue"):
        next(read_documents(SourceConfig(name="text", path=text), Report()))  # refuses a text that has none
    wanted = Wanted(kind, f"runs/{name}", data, str(start or "runs/NAME"), positions_of(start))
    taken, wanted = wanted.run_dir, free(wanted)
    path = out or Path(f"{name}.yaml" if kind == "pretrain" else f"{name}-{kind}.yaml")
    values, remarks = KINDS[kind].values(wanted), dict[str, str]()
    files: dict[Path, str] = {}
    if kind in ("pretrain", "tokenizer", "continue") and text is not None:
        source = SourceConfig(name="text", path=text)
        source, sizes = source.model_copy(update={"piece_bytes": piece_bytes(source)}), Sizes.of(source)
        sized = {"pretrain": size_pretraining, "tokenizer": size_tokenizer, "continue": hold_out}[kind]
        remarks = sized(values, sizes, source)
        if kind == "pretrain":
            remarks |= fit_steps(values, sizes, minutes or MINUTES)
            recipe = path.with_name(f"{path.stem}-tokenizer.yaml")
            of_tokenizer = KINDS["tokenizer"].values(wanted)
            files[recipe] = text_of(
                KINDS["tokenizer"], of_tokenizer, size_tokenizer(of_tokenizer, sizes, source), recipe
            )
    elif kind == "pretrain":
        values["model"] = {"vocab_size": 32768, **Sizes(0, SHAPES[-1]).model}
        values["train"]["steps"] = 1000
        recipe = path.with_name(f"{path.stem}-tokenizer.yaml")
        files[recipe] = text_of(KINDS["tokenizer"], KINDS["tokenizer"].values(wanted), {}, recipe)
    if start is None and "start_from" in values:
        remarks["start_from"] = (
            "a placeholder; first set it to a run, such as moe-lm import makes of a downloaded model"
        )
    files[path] = text_of(KINDS[kind], values, remarks, path)
    for file in files:
        if file.exists() and not force:
            raise UsageError(f"{file} is there already; give another --out, or --force to write over it")
    for file, content in files.items():
        write(file, content)
        yield f"wrote {file}"
    yield from (f"{key}: {remark}" for key, remark in remarks.items())
    if wanted.run_dir != taken:
        yield f"run_dir: {wanted.run_dir}, as {taken} holds a run"
    yield "next:"
    yield from (f"  {to_type(*words)}" for words in next_commands(kind, list(files)))


def free(wanted: Wanted) -> Wanted:
    """With the first folder in which there is no run yet: runs/mine, runs/mine-2, and so on."""
    folders = (wanted.folder if number == 1 else f"{wanted.folder}-{number}" for number in count(1))
    candidates = (wanted._replace(folder=folder) for folder in folders)
    return next(each for each in candidates if not (Path(each.run_dir) / "config.yaml").exists())


def next_commands(kind: str, files: list[Path]) -> Iterator[tuple[object, ...]]:
    """The words of each."""
    *recipe, path = files
    if recipe:
        yield "tokenizer", "train", recipe[0]
    if kind in ("pretrain", "continue"):
        yield "prepare", path
    verb = KINDS[kind].verb.split()
    if kind != "tokenizer":
        yield *verb, path, "--dry-run"
    yield *verb, path


def positions_of(start: Path | None) -> int:
    """The longest row that the model of a run can read. Raises UsageError if it is no run."""
    return 512 if start is None else read_model_config(checkpoint.resolve(start)).max_position_embeddings


def size_pretraining(values: Values, sizes: Sizes, source: SourceConfig) -> dict[str, str]:
    """Set what depends on the size of the text; returns remarks."""
    values["model"] |= {"vocab_size": sizes.vocab_size, **sizes.model}
    values["train"]["global_batch_size"] = sizes.shape.rows
    model = build_config(PretrainConfig, with_steps(values, 1), "init").model
    total = count_parameters(model).total
    return {
        "model.vocab_size": f"for {sizes.text_bytes / 1e6:,.1f} MB of text, {total / 1e6:.1f} million parameters",
        **hold_out(values, sizes, source),
    }


def hold_out(values: Values, sizes: Sizes, source: SourceConfig) -> dict[str, str]:
    """Cut the text into pieces of which some are held out; returns how much that is."""
    values["data"]["sources"][0]["piece_bytes"] = source.piece_bytes
    share = HELD_OUT if sizes.text_bytes > COUNTED else held_out_share(source)
    return {"data.validation_fraction": f"of pieces of about {source.piece_bytes:,} bytes, {share:.1%} is held out"}


def size_tokenizer(values: Values, sizes: Sizes, source: SourceConfig) -> dict[str, str]:
    values["vocab_size"] = sizes.vocab_size
    values["sources"][0]["piece_bytes"] = source.piece_bytes
    return {"vocab_size": f"for {sizes.text_bytes / 1e6:,.1f} MB of text"}


def fit_steps(values: Values, sizes: Sizes, minutes: float) -> dict[str, str]:
    """Set the steps that this machine takes in so many minutes, or that read the text EPOCHS times; returns remarks."""
    config = build_config(PretrainConfig, with_steps(values, 1), "init")
    seconds = pretrain.seconds_per_step(config, steps=3, batches=RandomBatches(config))
    tokens = config.train.global_batch_size * config.row_length
    epoch = sizes.text_bytes / BYTES_A_TOKEN * (1 - HELD_OUT) / tokens  # steps
    steps = max(10, min(int(60 * minutes / seconds), int(EPOCHS * epoch)))
    values["train"]["steps"] = steps
    values["train"]["schedule"]["warmup_steps"] = min(20, steps // 4)
    values["train"]["eval_every"] = max(1, min(100, steps // 4))
    device = pick_device(config.parallel.device).type
    machine = f"{cores()} cores" if device == "cpu" else device
    speed = f"{machine}: {tokens / seconds:,.0f} tokens/s just now"
    times = f"reading the text about {steps / epoch:.1f} times"
    return {"train.steps": f"about {format_seconds(steps * seconds)} here ({speed}), {times}"}


def with_steps(values: Values, steps: int) -> Values:
    return {**values, "train": {**values["train"], "steps": steps}}


class RandomBatches:
    """Batches of random tokens, to measure a step before there is a tokenizer."""

    fingerprint = ""

    def __init__(self, config: PretrainConfig) -> None:
        self._config = config

    def batch(self, step: int, rows: range) -> Batch:
        length = self._config.row_length
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self._config.model.vocab_size, (len(rows), length + 1), generator=generator).numpy()
        bounds = torch.arange(0, (len(rows) + 1) * length, length).numpy()
        return pack(ids[:, :-1], ids[:, 1:], bounds)


def text_of(kind: Kind, values: Values, remarks: Mapping[str, str], path: Path) -> str:
    """The file: what it is for, and its settings, each with a comment."""
    head = (
        f"# moe-lm {kind.verb} {path}: {kind.does}. Written by moe-lm init.\n"
        "# These are the settings that one usually touches; docs/config.md has all of them.\n"
    )
    return head + commented(kind.config, values, remarks)


def write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise MoeLmError(f"cannot write {path}: {error.strerror}; choose another --out") from error
