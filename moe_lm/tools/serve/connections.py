"""How long a connection may keep silent, and how many connections there may be.

uvicorn bounds the size of a request's head and closes a connection that stays idle after an answer. It has no limit
for a first request that never comes, or for headers that come byte by byte; this is it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_lm.common.process import open_files

HEAD_SECONDS = 10.0  # from a connection's first moment, or a request's first byte, until the headers are whole
SPARE_FILES = 32  # for everything that is not a connection
MOST_IDLE = 1024  # connections beside those that write texts
BACKLOG = 2048  # connections that wait to be accepted


def server_config(
    app: ASGIApp, texts: int, shutdown_seconds: int, head_seconds: float = HEAD_SECONDS
) -> uvicorn.Config:
    """uvicorn's settings for `texts` requests at a time; the files that the process may open bound the connections."""
    room = open_files() - SPARE_FILES
    connections = Connections(app, max(1, min(room // 2, texts + MOST_IDLE)), head_seconds)
    # asyncio accepts this many at once, and does so several times before those that are too many are closed.
    backlog = max(1, min(room // 8, BACKLOG))
    http: Any = partial(Connection, connections)
    return uvicorn.Config(
        connections, http=http, ws="none", log_level="warning", access_log=False, server_header=False, backlog=backlog,
        timeout_graceful_shutdown=shutdown_seconds,
    )  # fmt: skip


class Connections:
    """ASGI middleware that knows the open connections and which of them are being answered."""

    def __init__(self, app: ASGIApp, most: int, head_seconds: float) -> None:
        self.app, self.most, self.head_seconds = app, most, head_seconds
        self.open: dict[Connection, None] = {}  # the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection: Connection = scope["state"]["connection"]
        scope["state"]["close"] = connection.transport.abort

        async def watched() -> Message:
            message = await receive()
            connection.asks = message.get("more_body", False)
            return message

        connection.answering = True
        connection.forget()  # a body that is still to come has the deadline of the request
        try:
            await self.app(scope, watched, send)
        finally:
            connection.answering, connection.asks = False, True

    def add(self, connection: Connection) -> None:
        """Where this is one too many, the oldest whose client has not asked for anything is closed."""
        self.open[connection] = None
        if len(self.open) > self.most:
            oldest = next(one for one in self.open if one.asks)
            del self.open[oldest]
            oldest.transport.abort()


class Connection:
    """An asyncio protocol: uvicorn's, which ends when a request's headers do not come in time.

    `asks` says that it is the client's turn: no whole request has come yet, or the last one is answered.
    """

    def __init__(self, connections: Connections, *, app_state: dict[str, Any], **options: Any) -> None:
        self.asks, self.answering = True, False
        self._connections = connections
        self._http = H11Protocol(app_state={**app_state, "connection": self}, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._http, name)  # what asyncio calls beside these three

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._http.connection_made(transport)
        self._connections.add(self)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._http.data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        self.forget()
        self._connections.open.pop(self, None)
        self._http.connection_lost(error)

    def forget(self) -> None:
        """Let the connection be, until more bytes come after an answer."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch(self) -> None:
        if not self.answering and self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._connections.head_seconds, self.transport.abort)
