"""`moe-lm merge`: the weighted average of several checkpoints becomes a run, a piece of a tensor at a time.

Averaging the last checkpoints of a run whose rate has not decayed does much of what the decay would have done (LAWA,
arXiv 2306.03241; WSM, arXiv 2507.17634). Averaging runs that were fine-tuned from one start is a model soup
(arXiv 2203.05482).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moe_lm.checkpoint import checkpoint, lineage, write
from moe_lm.checkpoint.carried import is_carrying
from moe_lm.checkpoint.checkpoint import CARRIED, GENERATION, MODEL, MODEL_PREFIX, OPTIMIZER, TOKENIZER
from moe_lm.checkpoint.read import (
    CheckpointTensors,
    TensorSource,
    open_own_tensors,
    open_tensors,
    read_model_config,
)
from moe_lm.checkpoint.safetensors_file import Output, pieces_of, write_files
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import whole_folder
from moe_lm.config.moved import as_of, moved_along
from moe_lm.optim.average import EMA
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.interop.hf_tensors import EMBEDDING, HEAD
from moe_lm.tools.interop.transfer import FILE_BYTES
from moe_lm.train.settings import compare_config

MERGED = "merged.yaml"  # the checkpoints that were averaged, and their weights


def merge(paths: Sequence[Path], run_dir: Path, last: int | None = None, weights: str = "equal") -> str:
    """Write `run_dir` with the average of checkpoints, oldest first, and return what was averaged.

    `paths` are checkpoints or runs, of which the newest checkpoint counts, or with `last` one run and that many of its
    newest good checkpoints. `weights`: see `weights_of`. Adapters are merged into their base first. The new run holds
    no optimizer state: it evaluates, samples, exports, and is a start for more training.
    Raises UsageError when the checkpoints do not have the same shape and tokenizer, MoeLmError when one is damaged;
    nothing is left at `run_dir` then.
    """
    folders = [checkpoint.resolve(path) for path in paths] if last is None else last_of(paths, last)
    if len(folders) < 2:
        raise UsageError(f"{folders[0]} is one checkpoint, and merging takes two or more; add some, or give --last")
    shares = weights_of(weights, len(folders))
    for folder in folders[1:]:
        check_alike(folders[0], folder)
    with whole_folder(run_dir) as unfinished:
        _write(unfinished, run_dir, folders[-1], [open_tensors(folder) for folder in folders], shares, folders)
    lines = (f"  {share:.4f}  {folder}" for folder, share in zip(folders, shares, strict=True))
    return "\n".join([f"averaged {len(folders)} checkpoints, with weights", *lines])


def take_moving_average(path: Path, run_dir: Path) -> str:
    """Write `run_dir` with the moving average that training kept in a checkpoint, and return whose it is.

    What was not trained, and router biases, are as in the checkpoint. Raises UsageError when it has no average.
    """
    folder = checkpoint.resolve(path)
    if lineage.ADAPTER in checkpoint.entries(folder):
        raise UsageError(f"{folder} holds adapters, whose averages are not those of a model; give a run of a whole one")
    checkpoint.verify(folder, OPTIMIZER)
    average = MovingAverage(folder)
    if not average.averaged:
        raise UsageError(f"{folder} has no moving average; train with train.optimizer.ema_decay, like 0.999")
    with whole_folder(run_dir) as unfinished:
        _write(unfinished, run_dir, folder, [average], [1.0], [folder])
    return f"took the moving average of {len(average.averaged)} tensors from {folder}"


class MovingAverage:
    """The tensors of a checkpoint's model, with the moving average in place of each one that has it."""

    def __init__(self, folder: Path) -> None:
        self._model, self._optimizer = open_own_tensors(folder), CheckpointTensors(folder, OPTIMIZER)
        prefix = f"{EMA}."
        kept = [name for name in self._optimizer.names() if name.startswith(prefix)]
        self.averaged = {f"{MODEL_PREFIX}{name.removeprefix(prefix)}": name for name in kept}
        if kept and read_model_config(folder).tie_word_embeddings:
            self.averaged[f"{MODEL_PREFIX}{HEAD}"] = self.averaged[f"{MODEL_PREFIX}{EMBEDDING}"]

    def names(self) -> Iterable[str]:
        return self._model.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._model.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._model.dtype(name)

    def where(self, name: str) -> str:
        return self._model.where(name)

    def rows(self, name: str, start: int, stop: int, *across: slice) -> Tensor:
        if name in self.averaged:
            return self._optimizer.rows(self.averaged[name], start, stop, *across)
        return self._model.rows(name, start, stop, *across)


def last_of(paths: Sequence[Path], count: int) -> list[Path]:
    """The newest `count` good checkpoints of a run, oldest first. Raises UsageError if it does not have so many."""
    if len(paths) != 1:
        raise UsageError(f"--last {count} takes the checkpoints of one run, and {len(paths)} are given; give one")
    complete = checkpoint.complete_checkpoints(paths[0] / "checkpoints")
    good = checkpoint.good_steps(complete)
    if len(good) < count:
        raise UsageError(
            f"{paths[0]} holds {len(good)} good checkpoints, --last asks for {count}; lower it, or keep more while "
            "training with checkpoint.keep"
        )
    return [complete[step] for step in good[-count:]]


def weights_of(text: str, count: int) -> list[float]:
    """The shares of `count` checkpoints, oldest first, which add up to 1.

    `equal`; `linear`: 1, 2, 3, ...; `exponential`: each twice that of the one before it; or numbers, like `1,1,2`.
    """
    rising = {"equal": [1.0] * count, "linear": [1.0 + i for i in range(count)]}
    rising["exponential"] = [2.0 ** (i - count) for i in range(count)]
    if text in rising:
        numbers = rising[text]
    else:
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError as error:
            raise UsageError(f"--weights {text}: expected equal, linear, exponential, or numbers like 1,1,2") from error
    if len(numbers) != count:
        raise UsageError(f"--weights {text} are {len(numbers)} numbers for {count} checkpoints; give one for each")
    total = math.fsum(numbers)
    if not all(math.isfinite(number) for number in numbers) or total <= 0:
        raise UsageError(f"--weights {text} add up to {total:g}; give finite numbers with a positive sum")
    return [number / total for number in numbers]


def check_alike(one: Path, other: Path) -> None:
    """Raise UsageError if two checkpoints differ in the shape of the model or in the tokenizer."""
    shapes = (read_model_config(folder).model_dump(mode="json") for folder in (one, other))
    if differences := compare_config(*shapes):
        raise UsageError(
            f"{one} and {other} hold models of other shapes ({'; '.join(differences)}); merge checkpoints of one model"
        )
    words = [Tokenizer.load(checkpoint.verified_path(folder, TOKENIZER)).fingerprint for folder in (one, other)]
    if words[0] != words[1]:
        raise UsageError(f"{one} and {other} have different tokenizers; merge checkpoints of one model")


def _write(
    unfinished: Path,
    run_dir: Path,
    newest: Path,
    sources: Sequence[TensorSource],
    shares: Sequence[float],
    folders: Sequence[Path],
) -> None:
    """Write the checkpoint of the average of `sources` into the run folder that will be `run_dir`.

    All but its weights is as in the checkpoint `newest`.
    """
    entries = [
        {"checkpoint": str(folder), "fingerprint": lineage.fingerprint(folder), "weight": share}
        for folder, share in zip(folders, shares, strict=True)
    ]
    files: dict[str, write.Content] = {
        MODEL: partial(_write_average, sources, shares),
        MERGED: yaml.safe_dump(entries, sort_keys=False, allow_unicode=True),
        TOKENIZER: Tokenizer.load(checkpoint.verified_path(newest, TOKENIZER)).save,
        **_texts_of(newest, run_dir),
    }
    if is_carrying(newest):
        files[CARRIED] = newest / CARRIED
    checkpoint.verify(write.save(unfinished / "checkpoints", checkpoint.step_of(newest), {}, files))


def _write_average(sources: Sequence[TensorSource], shares: Sequence[float], path: Path) -> None:
    path.mkdir()
    first = sources[0]
    for source in sources[1:]:
        if set(source.names()) != set(first.names()):
            name = min(set(source.names()) ^ set(first.names()))
            raise MoeLmError(f"tensor {name} is not in all of the checkpoints; merge checkpoints of one model")
    outputs = [
        Output(
            name,
            first.shape(name),
            reduce(torch.promote_types, (source.dtype(name) for source in sources)),
            partial(_average, sources, shares, name),
        )
        for name in first.names()
    ]
    write_files(path, outputs, {"format": "pt"}, FILE_BYTES)


def _average(sources: Sequence[TensorSource], shares: Sequence[float], name: str) -> Iterator[Tensor]:
    """The rows of the average of a tensor, summed in float64 and in the order of the checkpoints."""
    shape = sources[0].shape(name)
    for start, stop in pieces_of(shape, item_bytes=8):
        rows = [source.rows(name, start, stop).double() * share for source, share in zip(sources, shares, strict=True)]
        yield sum(rows[1:], start=rows[0])


def _texts_of(folder: Path, run_dir: Path) -> dict[str, str]:
    """The files beside the tensors of a checkpoint that are true of the average of the run `run_dir` too."""
    known = checkpoint.entries(folder)
    texts = {name: checkpoint.read_text(folder, name) for name in ("model.yaml", GENERATION) if name in known}
    if lineage.ADAPTER not in known and "config.yaml" in known:  # a config with lora would promise adapters
        values = moved_along(checkpoint.read_section(folder, "config.yaml"), folder.parent.parent)
        texts["config.yaml"] = yaml.safe_dump(as_of(values, run_dir), sort_keys=False, allow_unicode=True)
        if "data.sha256" in known:
            texts["data.sha256"] = checkpoint.read_text(folder, "data.sha256")
    return texts
