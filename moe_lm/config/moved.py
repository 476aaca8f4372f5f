"""The paths in the config of a run folder that was moved, or is looked at from another working folder.

They were written relative to the working folder of that time, like `run_dir` itself. So the way from the old `run_dir`
to a path leads from where the run folder is now to where the path is now, if that was moved along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Place = tuple[Any, Any]  # a mapping or list, and the key or number of a path in it


def moved_along(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings in the config of the run in `folder`, in place, with paths to where things are now.

    A path is replaced by what is there the same way from the run folder: for what lies in it or beside it if that
    exists, for all else only if the path leads nowhere. Whoever reads them checks that the content is the same.
    """
    run_dir = values.get("run_dir")
    if not isinstance(run_dir, str) or not is_run(folder) or is_same(Path(run_dir), folder):
        return values
    values["run_dir"] = str(folder)
    for holder, key in paths_in(values):
        way = way_from(run_dir, holder[key])
        if way is None:
            continue
        there = os.path.normpath(folder / way)
        is_near = way.split(os.sep).count(os.pardir) <= 1
        if os.path.exists(there) and (is_near or not os.path.exists(holder[key])):
            holder[key] = there
    return values


def is_run(folder: Path) -> bool:
    """Whether a folder has a checkpoint of a run; `config.yaml` and `checkpoints` are names in many a project."""
    return any(folder.glob("checkpoints/step-*/config.yaml"))


def as_of(values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The settings of a run, in place, as those of a new one in `run_dir` that reads the same files."""
    values["run_dir"] = str(run_dir)
    for holder, key in paths_in(values):
        if run_dir.is_absolute() and os.path.exists(holder[key]):  # from any working folder
            holder[key] = os.path.abspath(holder[key])
    return values


def way_from(run_dir: str, path: str) -> str | None:
    """The way from a run folder to a path; None between a relative and an absolute path."""
    return None if os.path.isabs(run_dir) != os.path.isabs(path) else os.path.relpath(path, run_dir)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same place."""
    return os.path.realpath(one) == os.path.realpath(other)


def paths_in(values: dict[str, Any]) -> Iterator[Place]:
    """Where the settings of a run name its tokenizer, shards, sources, conversations and start."""
    data = values.get("data")
    data = data if isinstance(data, dict) else {}
    for holder, keys in ((values, ("start_from",)), (data, ("tokenizer", "shards"))):
        yield from ((holder, key) for key in keys if isinstance(holder.get(key), str))
    for name in ("sources", "train", "validation"):
        items = data.get(name)
        for number, item in enumerate(items) if isinstance(items, list) else ():
            if isinstance(item, str):
                yield items, number
            elif isinstance(item, dict):
                tokens = item.get("tokens")
                for holder in (item, tokens if isinstance(tokens, dict) else {}):
                    yield from ((holder, key) for key in ("path", "validation") if isinstance(holder.get(key), str))
