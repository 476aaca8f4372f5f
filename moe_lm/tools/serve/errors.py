"""Every error that a client can get, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

GONE = 499  # nginx's status for a client that did not wait; only the metrics show it


class ApiError(HTTPException):
    """Ends a request with this status and `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        if self.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def no_such_model(name: str, served: str) -> ApiError:
    return ApiError(404, f"there is no model {name!r:.80}; this server has {served!r}", "model", "model_not_found")


def add_handlers(app: FastAPI) -> None:
    """Give every error of the framework the same shape."""

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            error = _in_words(request, error)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return explain(error.errors()[0], request.headers.get("content-type", "")).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed; its log says why", code="internal_error").response()


def _in_words(request: Request, error: HTTPException) -> ApiError:
    place = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return ApiError(404, f"there is no {place}; see /v1/models, /v1/completions and /v1/chat/completions")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(405, f"{place} is not served; use {allowed}", headers=error.headers)
    if error.status_code == HTTPStatus.BAD_REQUEST and error.__cause__ is not None:
        return ApiError(400, f"the body is not JSON: {_unread(error.__cause__)}", code="invalid_json")
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _unread(cause: BaseException) -> str:
    """The reason of an error that the JSON parser raises beside its own."""
    if isinstance(cause, UnicodeDecodeError):
        return f"byte {cause.start} is not {cause.encoding.upper()}; send UTF-8"
    if isinstance(cause, RecursionError):
        return "lists and objects are nested too deep; flatten them"
    return f"a number in it cannot be read ({str(cause).partition(';')[0]}); send a smaller one"


def explain(item: Mapping[str, Any], content_type: str = "application/json") -> ApiError:
    """One of pydantic's errors, as a sentence that names the field."""
    param = ".".join(str(part) for part in item["loc"][1:])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {item['ctx']['error']}", code="invalid_json")
    if not param and not content_type.startswith("application/json"):
        return ApiError(400, f"the body's Content-Type is {content_type or 'missing'}; expected application/json")
    if not param:
        return ApiError(400, f"the body is not a request: {message[0].lower()}{message[1:]}")
    if item["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported here; leave it out", param, "unsupported_parameter")
    if item["type"] == "missing":
        return ApiError(400, f"{param} is missing; give it", param, "missing_parameter")
    shown = f"{item['input']!r}"
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return ApiError(400, f"{param}={shown}: {message[0].lower()}{message[1:]}", param, "invalid_value")
