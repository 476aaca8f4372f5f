"""Files in a store, such as a bucket, by their URL: `s3://`, `gs://`, `hf://`, `memory://`, and what else fsspec knows.

Credentials and addresses are the store's own client's, which reads its usual environment (AWS_*, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN). Every function takes a URL, and a `Path` that was made from one, which has
lost a slash by that.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import fspath
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import FULL, whole_file
from moe_lm.common.integrity import Entry, damage_in

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])|(file):/{1,3}(?=[^/])")  # `x:/` is no URL but a drive
ATTEMPTS, PAUSE_SECONDS = 3, 1.0  # the pause doubles
CONNECT_SECONDS, READ_SECONDS = 5, 20  # in which a store answers, where its client can be told
INSTALL = {"s3": "pip install s3fs", "gs": "pip install gcsfs", "gcs": "pip install gcsfs", "abfs": "pip install adlfs"}
OF_FOLDERS = ("file", "local", "memory")  # which do not know an empty folder from one that is not there

Place = str | Path
T = TypeVar("T")


class StorageError(MoeLmError):
    """A store did not do what was asked."""


class MissingError(StorageError, UsageError):
    """There is no such file, folder or bucket."""


class RefusedError(StorageError, UsageError):
    """The store does not let this user do it."""


class DamagedError(StorageError):
    """A file of a store is not what it was when it was written."""


class Found(NamedTuple):
    """A file in a store."""

    name: str  # relative to the folder that was listed
    url: str
    size: int  # bytes


def url_of(place: Place) -> str | None:
    """The URL that a place is; None for a path of this machine."""
    text = fspath(place)
    found = URL.match(text)
    if found is None:
        return None
    scheme, rest = found[1] or found[2], text[found.end() :]
    return f"{scheme}://{'/' if scheme in ('file', 'local') else ''}{rest}"


def is_remote(place: Place) -> bool:
    """Whether a place is in a store, and no path of this machine."""
    return url_of(place) is not None


def text_of(place: Place) -> str:
    """A place as a person writes it."""
    return url_of(place) or fspath(place)


def join(place: Place, *names: str) -> str:
    """The place of a file below a folder."""
    return "/".join([text_of(place).rstrip("/"), *names])


def cache_folder() -> Path:
    """Where this user keeps what was fetched: MOE_LM_CACHE, or `moe-lm` in XDG_CACHE_HOME or `~/.cache`."""
    if own := os.environ.get("MOE_LM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moe-lm")


# List


def find(place: Place) -> list[Found]:
    """Every file below a folder, sorted by name, or the file itself; none where there is none.

    Raises MissingError for a bucket that is not there, where the store knows buckets.
    """

    def files(store: Any, path: str) -> dict[str, Any]:
        try:
            return dict(store.find(path, detail=True))
        except FileNotFoundError:
            if _scheme(place) in OF_FOLDERS:
                return {}
            raise

    found, root = _asked("list", place, files), _path_of(place)
    return sorted(_found(place, path, entry, root) for path, entry in found.items())


def glob(place: Place) -> list[Found]:
    """The files that a pattern with `*`, `?`, `[` or `**` takes, sorted; their names begin where the pattern does."""
    root = re.split(r"[*?\[]", text_of(place))[0].rpartition("/")[0]
    found = _asked("list", place, lambda store, path: dict(store.glob(path, detail=True)))
    if not found:
        find(root)  # raises if that is why
    files = {path: entry for path, entry in found.items() if entry["type"] == "file"}
    return sorted(_found(place, path, entry, _path_of(root)) for path, entry in files.items())


def has_magic(place: Place) -> bool:
    """Whether `glob` is for it."""
    return re.search(r"[*?\[]", text_of(place)) is not None


def sizes(places: Sequence[Place]) -> list[int]:
    """The bytes of files, here or in stores, which are listed once. Raises OSError or StorageError."""
    urls = [url for place in places if (url := url_of(place)) is not None]
    there: dict[str, int] = {}
    for bucket in {_bucket(url) for url in urls}:
        inside = [url.partition("://")[2] for url in urls if _bucket(url) == bucket]
        folder = commonpath([path.rpartition("/")[0] for path in inside])
        there |= {found.url: found.size for found in find(f"{bucket.partition('://')[0]}://{folder}")}
    found = []
    for place in places:
        url = url_of(place)
        if url is not None and url not in there:
            raise MissingError(f"{url} is no longer in its store; bring it back, or give the files that are there")
        found.append(Path(place).stat().st_size if url is None else there[url])
    return found


def exists(place: Place) -> bool:
    """Whether there is a file."""
    return _asked("find", place, lambda store, path: bool(store.isfile(path)))


# Read


def open_binary(place: Place) -> BinaryIO:
    """A file to read, from its start or from where `seek` goes. A read that fails raises StorageError."""
    file = _asked("read", place, lambda store, path: store.open(path, "rb"))
    return cast(BinaryIO, io.BufferedReader(_Reader(file, text_of(place)), 1 << 20))


def read_bytes(place: Place) -> bytes:
    """The content of a small file."""
    return _asked("read", place, lambda store, path: bytes(store.cat_file(path)))


def read_range(place: Place, start: int, stop: int) -> bytes:
    """Some bytes of a file."""
    return _asked("read", place, lambda store, path: bytes(store.cat_file(path, start=start, end=stop)))


def fetch(place: Place, path: Path, entry: Entry | None = None) -> None:
    """Copy a file out of a store; it appears whole, and is what its line in a manifest says, or there is none.

    Raises StorageError, OSError for the disk here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, contested=True) as written:
        for _ in range(2):  # it may have been damaged on the way alone
            _asked("fetch", place, lambda store, there: store.get_file(there, str(written)))
            damage = None if entry is None else damage_in(written, entry)
            if damage is None:
                break
        else:
            raise DamagedError(f"{text_of(place)} {damage}; it was damaged in the store or on the way, upload it again")


# Write


def upload(path: Path, place: Place) -> None:
    """Copy a file into a store. Raises StorageError, FileNotFoundError if the file here is gone."""

    with path.open("rb"):  # in a store, "not found" is of the bucket
        pass
    _asked("write", place, lambda store, there: store.put_file(str(path), there))


def write_bytes(place: Place, content: bytes) -> None:
    """Write a small file."""
    _asked("write", place, lambda store, path: store.pipe_file(path, content))


def remove(places: Sequence[Place]) -> None:
    """Delete files, all of one store, in no order; those that are not there already are no error."""
    if not places:
        return
    paths = [_path_of(place) for place in places]
    try:
        _asked("delete", places[0], lambda store, _: store.rm(paths))
    except MissingError:
        if len(places) > 1:
            for place in places:
                remove([place])


def check_writable(place: Place, option: str) -> None:
    """Raise StorageError unless files can be written there, before the work that they are for."""
    probe = join(place, ".write-test")
    try:
        write_bytes(probe, b"can this be written?\n")
        remove([probe])
    except StorageError as error:
        raise type(error)(f"{option}={text_of(place)}: {error}") from error


# Errors


class _Reader(io.RawIOBase):
    """What an `fsspec` file reads, with errors in one sentence."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        with _in_one_sentence("read", self._url):
            content = self._file.read(len(view))
        view[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _asked(verb: str, place: Place, action: Callable[[Any, str], T]) -> T:
    """What `action` makes of the store and the path in it; tried again when the store does not answer."""
    url, pause = text_of(place), PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _in_one_sentence(verb, url):
                return action(*_store_of(url))
        except (MissingError, RefusedError, DamagedError):
            raise
        except StorageError:
            if attempt == ATTEMPTS:
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _store_of(url: str) -> tuple[Any, str]:
    """The `fsspec` file system of a URL, and the path in it. Another thread has one of its own."""
    from fsspec.core import url_to_fs

    scheme = _scheme(url)
    options: dict[str, Any] = {"use_listings_cache": False}  # others write there too
    if scheme in ("file", "local"):
        options["auto_mkdir"] = True
    if scheme in ("s3", "s3a"):
        waits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        options["config_kwargs"] = {**waits, "retries": {"max_attempts": 1}}
    store, path = url_to_fs(url, **options)
    if scheme in ("s3", "s3a"):
        store.retries = 2  # `_asked` tries again too
    return store, path


@contextmanager
def _in_one_sentence(verb: str, url: str) -> Iterator[None]:
    """Turn what the clients of stores raise, which are many and share no class, into our errors."""
    try:
        yield
    except FileNotFoundError as error:
        if _is_of_a_file_here(error, url):
            raise
        why = f": {error.strerror or error}" if "bucket" in str(error) else ""
        raise MissingError(f"cannot {verb} {url}: it is not there{why}; check the address") from error
    except ImportError as error:
        install = INSTALL.get(_scheme(url), "install it")
        raise UsageError(f"cannot {verb} {url}: {_first_line(error)}; run: {install}") from error
    except MoeLmError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in FULL or _is_of_a_file_here(error, url)):
            raise
        if str(error).startswith("Protocol not known"):
            raise UsageError(f"cannot {verb} {url}: fsspec knows no store {_scheme(url)}://") from error
        if isinstance(error, PermissionError) or "Credential" in type(error).__name__ or _status(error) in (401, 403):
            raise RefusedError(
                f"cannot {verb} {url}: the store refuses it ({_first_line(error)}); check the credentials and what "
                "they allow"
            ) from error
        raise StorageError(
            f"cannot {verb} {url}: the store does not answer as it should ({_first_line(error)}); see that it is "
            "reachable from here, and try again"
        ) from error


def _is_of_a_file_here(error: OSError, url: str) -> bool:
    return error.filename is not None and _scheme(url) not in OF_FOLDERS


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _found(place: Place, path: str, entry: Mapping[str, Any], root: str) -> Found:
    name = path.removeprefix(root).lstrip("/") or path.rpartition("/")[2]
    return Found(name, text_of(f"{_scheme(place)}:/{path.lstrip('/')}"), int(entry["size"] or 0))


def _path_of(place: Place) -> str:
    return _store_of(text_of(place))[1]


def _scheme(place: Place) -> str:
    return text_of(place).partition("://")[0]


def _bucket(url: str) -> str:
    scheme, _, path = url.partition("://")
    return f"{scheme}://{path.partition('/')[0]}"
