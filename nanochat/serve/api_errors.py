"""What the server answers when it cannot: one shape for every route, the one that OpenAI's clients read.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}

A message names the value, the rule and the fix where the client can mend it, and nothing of our insides where
it cannot. The body is plain ASCII: a message may quote half of a surrogate pair, which is no UTF-8.
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
_SHOWN = 3  # mistakes of one request that are told of
_WITHOUT_VALUE = ("missing", "extra_forbidden")


class ApiError(Exception):
    """An answer with a status of 400 or more; `param` is the setting that is wrong, `code` says how."""

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
        """Return the answer."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def _tell(mistake: dict[str, Any], body: Any) -> tuple[str | None, str]:
    """Return the field that is wrong, if it is one, and what is wrong with it."""
    kind, value = mistake["type"], reprlib.repr(mistake["input"])
    if kind == "json_invalid":
        return None, f"the body is no JSON: {mistake['ctx']['error']}, at character {mistake['loc'][1]}"
    place = ".".join(_fields(mistake["loc"][1:], body, is_missing=kind == "missing"))
    if not place:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    text = mistake["msg"].removeprefix("Value error, ")
    return place, f"{place}: {text}" + (f", not {value}" if kind not in _WITHOUT_VALUE else "")


def _fields(loc: Sequence[str | int], body: Any, is_missing: bool) -> Iterator[str]:
    """Yield the fields and indices of a place; pydantic also tells which of several types it has tried."""
    for item in loc:
        if isinstance(body, list) and isinstance(item, int):
            body = body[item]
        elif isinstance(body, dict) and (item in body or (is_missing and item is loc[-1])):
            body = body.get(item)
        else:
            continue
        yield str(item)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of an app the one shape; what we did not foresee is logged and says nothing."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path[:100]} here, but {', '.join(app.openapi()['paths'])}"
        elif error.status_code == 405 and error.headers:
            message = f"{request.url.path} is for {error.headers['Allow']}, not {request.method[:100]}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = [_tell(mistake, error.body) for mistake in error.errors()[:_SHOWN]]
        return ApiError(400, "; ".join(text for _, text in told), param=told[0][0]).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        headers = {"Connection": "close"}  # uvicorn does so, and the client should not find out by itself
        return ApiError(500, "the server made a mistake; its log says more", headers=headers).response()
