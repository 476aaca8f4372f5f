"""A process in which foreign chat templates run, with limits that no template can get around.

Jinja's own sandbox keeps a template from the objects of Python, but not from loops without an end or `'a' * 10**10`.
Those end here: a rendering has SECONDS of processor time, after which the kernel ends the process, and MEMORY bytes.
Should a template ever break out of Jinja, it finds itself in a process that can open no file, no socket and no other
process. One process serves all templates, from the first that is needed; a rendering costs half a millisecond more.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from moe_lm.tokenizer.chat.traced import Traced
from moe_lm.tokenizer.chat.writing import Conversation, Templates

SECONDS = 1.0  # of processor time for a rendering, and as much again for each MEGABYTE of conversation
MEGABYTE = 1_000_000
MEMORY = 1 << 29  # bytes beside those that the process has at its start
MOST_CHARACTERS = 1 << 24  # of what is written
PATIENCE = 300  # seconds until a process that uses no processor time counts as dead
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # of a terminal or a scheduler: the parent decides
TEXT, ERROR = "text", "error"


class SandboxError(Exception):
    """Why a template did not write; the message is the reason alone."""


class Sandbox:
    """The process, started when it is needed, and again after a template made it end."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def check(self, texts: Mapping[str, str]) -> None:
        """Compile templates. Raises SandboxError for what is no template."""
        self._ask(pickle.dumps((dict(texts), None)))

    def write(self, texts: Mapping[str, str], conversation: Conversation) -> Traced:
        """The conversation as these templates write it. Raises SandboxError when they fail or go beyond the limits."""
        text, authors = self._ask(pickle.dumps((dict(texts), tuple(conversation))))
        if len(text) != len(authors):
            raise SandboxError("its characters have no authors")
        return Traced(text, authors)

    def _ask(self, request: bytes) -> tuple[str, str]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._connection.send_bytes(request)
                if not self._connection.poll(PATIENCE):
                    raise EOFError
                answer = [self._connection.recv_bytes(4 * MOST_CHARACTERS) for _ in range(3)]
            except (EOFError, OSError):
                raise SandboxError(self._why_it_ended()) from None
            except BaseException:  # Ctrl-C: its answer would be taken for that to the next request
                self._end()
                raise
        kind, text, authors = (part.decode("utf-8", "surrogatepass") for part in answer)
        if kind == ERROR:
            raise SandboxError(text)
        return text, authors

    def _start(self) -> None:
        self._connection, other = Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        program = ["-P", "-m", "moe_lm.tokenizer.chat.sandbox"]  # -P: nothing is imported from the working folder
        command = [sys.executable, *program, str(other.fileno()), str(self._seconds)]
        self._process = subprocess.Popen(
            command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        )
        other.close()

    def _why_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._end()
        if code == -signal.SIGPROF:
            return f"it takes more than {self._seconds:g} s of processor time, or never ends"
        return f"it takes more than {MEMORY >> 20} MiB of memory, or made its process end ({code})"

    def _end(self) -> int | None:
        """End the process; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        process.kill()  # it has nothing to finish
        return process.wait()


def sandbox() -> Sandbox:
    """The sandbox of this process; a fork gets one of its own."""
    return _sandbox_of(os.getpid())


@functools.cache
def _sandbox_of(process: int) -> Sandbox:
    return Sandbox()


def forked(render: Callable[[], str]) -> str:
    """The text that another program's renderer makes in a fork of this process, within the limits of a rendering.

    Raises SandboxError when it fails or goes beyond them.
    """
    reader, writer = Pipe(duplex=False)
    process = os.fork()
    if not process:
        _render_and_exit(render, writer)
    writer.close()
    impatience = threading.Timer(PATIENCE, os.kill, (process, signal.SIGKILL))
    impatience.start()
    try:
        kind, text = (reader.recv_bytes(4 * MOST_CHARACTERS).decode("utf-8", "surrogatepass") for _ in range(2))
    except (EOFError, OSError):
        much = f"{SECONDS:g} s of processor time, {PATIENCE} s in all, or {MEMORY >> 20} MiB of memory"
        kind, text = ERROR, f"it takes more than {much}"
    finally:
        reader.close()
        impatience.cancel()
        os.kill(process, signal.SIGKILL)  # it has nothing to finish
        os.waitpid(process, 0)
    if kind == ERROR:
        raise SandboxError(text)
    return text


# In the process


def serve(connection: Connection, seconds: float) -> None:
    """Answer requests until nobody can ask any more."""
    compiled = functools.lru_cache(maxsize=16)(lambda texts: Templates(dict(texts)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds * (1 + len(request) / MEGABYTE))  # SIGPROF ends the process
        texts, conversation = pickle.loads(request)
        try:
            templates = compiled(tuple(texts.items()))
            written = Traced("") if conversation is None else templates.write(Conversation(*conversation))
            if len(written) > MOST_CHARACTERS:
                raise SandboxError(f"it writes {len(written)} characters, expected at most {MOST_CHARACTERS}")
            kind, text, authors = TEXT, str.__str__(written), written.authors
        except MemoryError:
            kind, text, authors = ERROR, f"it takes more than {MEMORY >> 20} MiB of memory", ""
        except Exception as error:  # a template may raise anything
            kind, text, authors = ERROR, str(error)[:10_000] or type(error).__name__, ""
        signal.setitimer(signal.ITIMER_PROF, 0)
        for part in (kind, text, authors):
            connection.send_bytes(part.encode("utf-8", "surrogatepass"))


def _render_and_exit(render: Callable[[], str], writer: Connection) -> NoReturn:
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        _confine()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = TEXT, render()
        except Exception as error:  # a template may raise anything
            answer = ERROR, str(error)[:10_000] or type(error).__name__
        for part in answer:
            writer.send_bytes(part.encode("utf-8", "surrogatepass"))
    finally:
        os._exit(0)  # nothing of the parent is to be cleaned up twice


def _confine() -> None:
    """Take from this process what a template has no use for: files, sockets, processes, and more than some memory."""
    # What Jinja imports when it needs it, and will not be able to.
    import html  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401

    with contextlib.suppress(ZeroDivisionError):
        Templates({"default": "{{ '\\u00e9\\n' | tojson | pprint | urlize }}{{ 1 / 0 }}"}).write(
            Conversation([], [], False, {})
        )
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        _limit(kind, 0)


def _limit(kind: int, most: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # some systems refuse some of them
        resource.setrlimit(kind, (most, most))


def _address_space() -> int:
    """Bytes of this process; on systems that do not say, so many that the limit means nothing."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 1 << 46


if __name__ == "__main__":
    for ignored in HEARD:
        signal.signal(ignored, signal.SIG_IGN)
    _confine()
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
