"""What the server answers when it cannot: one shape for every route, the one that OpenAI's clients read.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}

A message names the value, the rule and the fix where the client can mend it, and nothing of our insides where
it cannot. The body is plain ASCII: a message may quote half of a surrogate pair, which is no UTF-8.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_SHOWN = 3  # mistakes of one request that are told of


class ApiError(Exception):
    """An answer with a status of 400 or more; `param` is the setting that is wrong, `code` says how."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
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


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of an app the one shape; what we did not foresee is logged and says nothing."""

    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    async def http(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        mistakes = error.errors()[:_SHOWN]
        where = [".".join(map(str, mistake["loc"][1:])) for mistake in mistakes]
        texts = [mistake["msg"].removeprefix("Value error, ") for mistake in mistakes]
        shown = [f"{place}: {text}" if place else text for place, text in zip(where, texts, strict=True)]
        return ApiError(400, "; ".join(shown), param=where[0] or None).response()

    async def unforeseen(request: Request, error: Exception) -> Response:
        headers = {"Connection": "close"}  # uvicorn does so, and the client should not find out by itself
        return ApiError(500, "the server made a mistake; its log says more", headers=headers).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)
