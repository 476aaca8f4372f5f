"""Folders of the Hugging Face hub under their names, `OWNER/NAME` or `OWNER/NAME@REVISION`: fetched into its cache."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moe_lm.common.errors import MoeLmError, UsageError

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@([\w./-]+))?")
SECONDS = 5.0  # in which the hub answers
OURS = ("runs", "configs", "tokenizer", "data", "shards", "checkpoints")  # folders of runs, and owners of nothing
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "encoder.json",
    "vocab.bpe",
)  # fmt: skip
MODEL_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "adapter_config.json",
               "base_fingerprint.txt", "*.safetensors", "*.safetensors.index.json")  # fmt: skip


def is_name(path: Path) -> bool:
    """Whether this is no path of this machine, and can be a name of the hub."""
    here = path.exists() or path.parent.exists() or path.parts[0] in OURS
    return NAME.fullmatch(str(path)) is not None and not here


def local_folder(path: Path, files: Sequence[str], enough: str | None = None) -> Path:
    """The folder at `path`, or for a name of the hub that in its cache, with the files that these patterns take.

    The hub is not asked for a repository whose file `enough` is in the cache, and without a network the cache serves.
    Raises UsageError for a repository that is not there or not for this user, MoeLmError if the hub cannot be reached.
    """
    found = NAME.fullmatch(str(path))
    if found is None or not is_name(path):
        return path
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars

    name, revision = found.groups()
    cached = try_to_load_from_cache(name, enough, revision=revision) if enough is not None else None
    if isinstance(cached, str):
        return Path(cached).parent
    if not sys.stderr.isatty():
        disable_progress_bars()
    elsewhere = f"fetch it where there is a network (hf download {name} --local-dir FOLDER), and give that folder"
    with _in_one_sentence(f"{path} is no folder here{_meant(path)}, and ", str(path), elsewhere):
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*files], ignore_patterns=["*/*"]))


def typed_path(text: str) -> Path:
    """A path that was typed; one that begins with `./` is no name of the hub, though `Path` forgets how it began."""
    return Path.cwd() / text if text.startswith("./") else Path(text)


def _meant(path: Path) -> str:
    """The folder with nearly this path, if there is one."""
    near = get_close_matches(path.parts[0], (item.name for item in Path().iterdir() if item.is_dir()), n=1)
    meant = Path(*near, *path.parts[1:])
    return f" (did you mean {meant}?)" if near and meant.exists() else ""


def shown(folder: Path) -> str:
    """The name of a folder for people: that on the hub for one in its cache, whose own is a hash."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def is_reachable() -> bool:
    """Whether the hub answers within seconds, which its client would take minutes to deny."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of the client that huggingface_hub uses: no route, no name, no answer
        return False
    return True


def check_can_push(name: str) -> None:
    """Raise UsageError unless this is a name under which who is logged in to the hub may write: before hours of work.

    What a fine-grained token allows only the push itself finds out.
    """
    if NAME.fullmatch(name) is None or "@" in name:
        raise UsageError(f"--push {name} is not a name of the hub; give OWNER/NAME")
    from huggingface_hub import HfApi

    with _in_one_sentence("--push: ", name, "export without it, and push later with hf upload"):
        user = HfApi().whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UsageError(f"--push {name}: this token of the hub only reads; run hf auth login with one that writes")
    owners = [owner["name"] for owner in (user, *user.get("orgs", ()))]
    if role != "fineGrained" and name.partition("/")[0] not in owners:
        raise UsageError(f"--push {name} is of another owner; who is logged in may write to {', '.join(owners)}")


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name`, which is made, private, if it is not there; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _in_one_sentence(f"{folder} is written, but ", name, f"push it later: hf upload {name} {folder}"):
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by moe-lm")
    return f"{api.endpoint}/{name}"


@contextmanager
def _in_one_sentence(before: str, name: str, unreached: str) -> Iterator[None]:
    """Turn what the hub's client raises into our errors, which begin with `before`."""
    from huggingface_hub import errors

    unreachable: Any = errors.HfHubHTTPError.__bases__[0]  # of httpx, or of what the client uses in its place

    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{before}{name} is gated: its owner must let you in; ask on its page on the hub, then run hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise UsageError(
            f"{before}there is no {what} {name} on the hub, or it is private (hf auth login); check the name"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise UsageError(f"{before}no one is logged in to the hub; run hf auth login, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        raise MoeLmError(f"{before}the hub refused {name}: {str(error).splitlines()[0]}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, unreachable) as error:
        raise MoeLmError(f"{before}the hub cannot be reached; {unreached}") from error
