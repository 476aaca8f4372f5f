"""The verb `serve`: a socket, a model, and an end without a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from moe_lm.common.errors import MoeLmError
from moe_lm.common.signals import unignored
from moe_lm.config.generation import CompiledLoadConfig, ServeConfig
from moe_lm.generate.session import Session
from moe_lm.tools.serve.app import build_app
from moe_lm.tools.serve.connections import BACKLOG, server_config
from moe_lm.tools.serve.limits import LOOPBACK_NAMES, Limits
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.scheduler import Scheduler

MOST_BODY = 1 << 20  # bytes of a request
GRACE = 30.0  # seconds that running requests have to end when a signal comes


def serve(run: Path, config: ServeConfig, load: CompiledLoadConfig) -> None:
    """Serve until a signal; then give running requests `GRACE` seconds to end."""
    with listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        at_home = ip_address(host).is_loopback
        if not (at_home or config.api_key):
            print(f"warning: {host}:{port} can be reached by others, and there is no --api-key", file=sys.stderr)
        session = Session.open(run, load, load.compile)
        metrics = Metrics()
        positions = session.model.config.max_position_embeddings
        context = min(config.max_context or positions, positions)
        scheduler = Scheduler(session, config.max_concurrent, context, config.max_queue, metrics)
        scheduler.warm_up()
        hosts = LOOPBACK_NAMES if at_home and not config.api_key else None
        limits = Limits(MOST_BODY, config.timeout, config.max_tokens, config.api_key, hosts)
        app = build_app(session, scheduler, limits, metrics, config.model_name or run.resolve().name)
        # Longer than GRACE only for a client that does not read its answer.
        connections = server_config(app, scheduler.most, shutdown_seconds=math.ceil(GRACE) + 5)
        logging.basicConfig(format="%(levelname)s: %(message)s")
        asyncio.run(_run(connections, scheduler, listener))


def listen(host: str, port: int) -> socket.socket:
    """A socket that already listens, so that clients can wait while the model loads; port 0 is any free port.

    Raises MoeLmError when the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MoeLmError(
            f"--host {host} is not an address of this machine ({error.strerror}); try 127.0.0.1"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise MoeLmError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop the program that uses it or choose another --port"
        ) from error
    return listener


async def _run(config: uvicorn.Config, scheduler: Scheduler, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    server = _Server(config)
    scheduler.start(loop)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"serving on http://{where}:{port}; Ctrl-C stops", file=sys.stderr, flush=True)
    with _signals(loop, server, scheduler):
        await server.serve(sockets=[listener])
    scheduler.close()


class _Server(uvicorn.Server):
    """uvicorn without its handling of signals: it raises them again when it is done, and we exit with 0."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # the kernel may hold more than are accepted at once

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, server: uvicorn.Server, scheduler: Scheduler) -> Iterator[None]:
    """At the first signal, let running requests end within `GRACE` seconds; at a second one, do not wait."""

    def stop() -> None:
        if server.should_exit:
            scheduler.close()
            return
        scheduler.refuse()
        server.should_exit = True
        loop.call_later(GRACE, scheduler.close)

    before = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop)) for number in unignored()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
