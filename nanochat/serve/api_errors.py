"""The server's error responses: one format for every route, which OpenAI's clients read.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}

For an error that the client can fix, the message names the value, the rule and the fix; for others it shows
no internals. The body is ASCII: a message may quote half of a surrogate pair, which is not valid UTF-8.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_ERRORS = 3  # of one request in its message
_WITHOUT_VALUE = ("missing", "extra_forbidden")


class ApiError(Exception):
    """A response with a status of 400 or more; `param` is the wrong field, `code` OpenAI's error code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def response(self) -> Response:
        """Return the response."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def _describe(error: dict[str, Any], body: Any) -> tuple[str | None, str]:
    """Return the field with a validation error, None if it is not in a field, and the message."""
    kind, value = error["type"], reprlib.repr(error["input"])
    if kind == "json_invalid":
        return None, f"the body is not JSON: {error['ctx']['error']}, at character {error['loc'][1]}"
    path = ".".join(_path(error["loc"][1:], body, is_missing=kind == "missing"))
    if not path:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    text = error["msg"].removeprefix("Value error, ")
    return path, f"{path}: {text}" + (f", not {value}" if kind not in _WITHOUT_VALUE else "")


def _path(loc: Sequence[str | int], body: Any, is_missing: bool) -> Iterator[str]:
    """Yield the fields and indices of pydantic's location, without the types of unions in it."""
    for item in loc:
        if isinstance(body, list) and isinstance(item, int):
            body = body[item]
        elif isinstance(body, dict) and (item in body or (is_missing and item is loc[-1])):
            body = body.get(item)
        else:
            continue
        yield str(item)


def install_error_handlers(app: FastAPI) -> None:
    """Give all errors of an app the one format; unexpected ones are logged, and their response is vague."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"unknown path {request.url.path[:100]}; there are {', '.join(app.openapi()['paths'])}"
        elif error.status_code == 405 and error.headers:
            message = f"{request.url.path} is for {error.headers['Allow']}, not {request.method[:100]}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        described = [_describe(item, error.body) for item in error.errors()[:_MAX_ERRORS]]
        message = "; ".join(text for _, text in described)
        return ApiError(400, message, param=described[0][0]).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        headers = {"Connection": "close"}  # uvicorn closes it, which the client must know
        return ApiError(500, "internal error; the server's log has the details", headers=headers).response()
