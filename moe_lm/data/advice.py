"""What to do about shards that are absent or damaged, here and in a store."""

from __future__ import annotations

from pathlib import Path

from moe_lm.common import storage

PREPARE = "run moe-lm prepare with the run's config first"
COPY = {"s3": "aws s3 sync shards {url}", "gs": "gcloud storage rsync --recursive shards {url}"}


def no_shards(folder: Path, manifest: str) -> str:
    """What to say of the folder of a source that has no manifest."""
    if storage.is_remote(folder):
        return f"there are no shards in {storage.text_of(folder)} yet; {into_store(folder.parent)}"
    is_unfinished = any(folder.glob(".work-*"))  # as prepare leaves it when it is stopped
    if any(folder.glob("*.bin")) and not is_unfinished:
        return f"{folder / manifest} is missing beside the token files; bring it back, or {again(folder)}"
    return f"there are no shards in {folder} yet; {PREPARE}"


def again(folder: Path) -> str:
    """How the damaged shards of a source are replaced."""
    if storage.is_remote(folder):
        return f"copy {storage.text_of(folder)} there again"
    return f"delete {folder} and run moe-lm prepare"


def into_store(shards: Path) -> str:
    """How shards come into a store, which `prepare` does not write to."""
    url = storage.text_of(shards)
    scheme, _, path = url.partition("://")
    if scheme == "memory":
        return "give a folder as data.shards, since what is in memory:// ends with its process"
    command = f"cp -r shards/. {path}" if scheme == "file" else COPY.get(scheme, "").format(url=url)
    example = f", as with: {command}" if command else ""
    return f"prepare with data.shards=shards, then copy that folder there{example}"
