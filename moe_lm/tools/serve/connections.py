"""What uvicorn leaves open: how long a connection may say nothing, and how many there may be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEAD_SECONDS = 10.0  # from a connection's first moment, or a request's first byte, until the headers are whole
SPARE_FILES = 32  # for all that is no connection
MOST_IDLE = 1024  # connections beside those that write texts
BACKLOG = 2048  # connections that wait to be accepted


class Config(uvicorn.Config):
    """uvicorn's, with room for `texts` requests at a time; what the process may open bounds the connections."""

    def __init__(self, app: ASGIApp, *, texts: int, head_seconds: float = HEAD_SECONDS, **options: Any) -> None:
        room = openable() - SPARE_FILES
        self.head_seconds = head_seconds
        self.most_connections = max(1, min(room // 2, texts + MOST_IDLE))
        # asyncio accepts so many in one go, and some goes pass before those that are too many are closed.
        backlog = max(1, min(room // 8, BACKLOG))
        super().__init__(app, http=Connection, ws="none", log_level="warning", backlog=backlog, **options)


def openable() -> int:
    """Files and sockets that this process may still open, its soft limit raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS calls its hard limit infinite and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return (1 << 20 if soft == resource.RLIM_INFINITY else soft) - len(os.listdir("/dev/fd"))


class Connection(H11Protocol):
    """Ends when its headers do not come in time; one too many ends the oldest that nobody answers."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.head_seconds, self.most = config.head_seconds, config.most_connections
        self.began = self.loop.time()
        self.deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) <= self.most:
            return
        ours = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(ours) > self.most:
            min((one for one in ours if one.asks), key=lambda one: one.began).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    @property
    def asks(self) -> bool:
        """Whether it is the client's turn: a whole request has not come yet, or the last one is answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _watch(self) -> None:
        """A body that is awaited has the gate's deadline; one that comes after the answer has this one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
