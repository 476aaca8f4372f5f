"""The application: its paths, and the handler of each."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib import resources
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, Response

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import UsageError
from moe_lm.generate.session import Session
from moe_lm.tools.serve.endpoints import Endpoints
from moe_lm.tools.serve.errors import add_handlers, no_such_model
from moe_lm.tools.serve.limits import Limits, LimitsMiddleware
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.scheduler import Scheduler

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def build_app(session: Session, scheduler: Scheduler, limits: Limits, metrics: Metrics, model: str) -> FastAPI:
    """An ASGI application around a scheduler that is running; `model` is the name that clients use."""
    app = FastAPI(title="moe-lm", openapi_url=None, redirect_slashes=False)
    endpoints = Endpoints(session, scheduler, limits, metrics, model)
    app.post("/v1/completions", response_model=None)(endpoints.complete)
    app.post("/v1/chat/completions", response_model=None)(endpoints.chat)
    metrics.watch("running_rows", "Texts that are being written.", lambda: scheduler.running)
    metrics.watch("queued_rows", "Texts that wait for a row.", lambda: scheduler.queued)
    metrics.watch("slots", "Texts that can be written at a time.", lambda: scheduler.slots)
    described = describe(session, scheduler, model)
    page = resources.files("moe_lm.tools.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page), "X-Frame-Options": "DENY"}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [described]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        if name != model:
            raise no_such_model(name, model)
        return JSONResponse(described)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if scheduler.healthy else "stopping"}, 200 if scheduler.healthy else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    add_handlers(app)
    app.add_middleware(LimitsMiddleware, limits=limits, metrics=metrics, endpoints=PATHS)
    return app


def describe(session: Session, scheduler: Scheduler, model: str) -> dict[str, Any]:
    """The model as /v1/models lists it: OpenAI's fields, and those that the page needs."""
    config = session.model.config
    layers = len(session.model.moe_layers)
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    return {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moe-lm",
        "max_model_len": scheduler.capacity,
        "chat": chats(session),
        "moe_layers": layers,
        "layers": config.moe_layers,  # their numbers, counted from 0 as elsewhere
        "shown": f"{model} · {parameters / 1e6:,.1f}M · {session.checkpoint.name}",
        "experts": config.n_routed_experts if layers else 0,
        "experts_per_token": config.num_experts_per_tok if layers else 0,
    }


def chats(session: Session) -> str:
    """ "no" without a chat template, "untrained" when no fine-tuning has taught it yet, else "yes"."""
    try:
        session.tokenizer.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except UsageError:
        return "no"
    if not checkpoint.verify(session.checkpoint, "config.yaml"):  # imported
        return "yes"
    config = checkpoint.read_section(session.checkpoint, "config.yaml")
    came_from_elsewhere = bool(checkpoint.verify(session.checkpoint, checkpoint.GENERATION))
    return "untrained" if "model" in config and not came_from_elsewhere else "yes"


def _policy(page: str) -> str:
    """The Content-Security-Policy: only the page's own script and style, and requests to its own server."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[0].encode()).digest())
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script'].decode()}'; "
        f"style-src 'sha256-{hashes['style'].decode()}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
