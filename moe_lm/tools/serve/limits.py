"""The checks that every request passes before the endpoints: host, key and size of the body; and its metrics."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_lm.tools.serve.errors import ApiError
from moe_lm.tools.serve.metrics import Metrics

OPEN = ("/", "/health")  # need no key: the page asks for it, and a health check has none
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Limits:
    """The most that a client may ask for, and the key that it must send."""

    max_body: int  # bytes
    timeout: float  # seconds, for reading a request and for answering it
    max_tokens: int | None = None
    api_key: str | None = None
    hosts: Collection[str] | None = None  # the names that this server answers to; None is all


class LimitsMiddleware:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, endpoints: Collection[str]) -> None:
        self.app, self.limits, self.metrics, self.endpoints = app, limits, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            try:
                self._check(scope)
                receive = await self._with_body(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, send_counted)
            else:
                await self.app(scope, receive, send_counted)
        finally:
            endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
            # A stream that breaks has already sent 200; its endpoint leaves its real status here.
            self.metrics.requests.labels(endpoint, scope.get("moe_lm.status", status)).inc()
            self.metrics.request_seconds.labels(endpoint).observe(time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        name = headers.get(b"host", b"").decode("latin-1").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if self.limits.hosts is not None and name not in self.limits.hosts:
            raise ApiError(
                421,
                f"the Host is {name!r}, and without a key a server on the loopback answers to "
                f"only {', '.join(self.limits.hosts)}, against web pages that rebind their name; give --api-key",
                code="wrong_host",
            )
        if self.limits.api_key is None or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.limits.api_key}".encode()):
            what = "is wrong" if given else "is missing"
            raise ApiError(
                401,
                f"the API key {what}; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within its limits. Returns a `receive` that gives it to the endpoint in one piece."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.limits.max_body:
            raise self._too_large()
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.limits.timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limits.max_body:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.timeout:g} s", code="timeout") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.limits.max_body} bytes; send less", code="body_too_large")
