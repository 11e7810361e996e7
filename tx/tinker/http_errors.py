"""Errors as HTTP: which status, what body, which headers. Routes raise, and know none of this."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from tx.errors import (
    Forbidden,
    InvalidInput,
    NotFound,
    Overloaded,
    TooLarge,
    TooSlow,
    TxError,
    Unauthorized,
)

log = logging.getLogger(__name__)

STATUS: dict[type[Exception], int] = {
    NotFound: 404,
    TooLarge: 413,
    InvalidInput: 400,
    Unauthorized: 401,
    Forbidden: 403,
    TooSlow: 408,
    Overloaded: 429,
    TxError: 500,
    PoolTimeout: 503,
    DBAPIError: 503,
}
"""Errors to HTTP, the first class that fits. Never 409: clients retry it for minutes (protocol §1.6)."""


def handle_in(app: FastAPI) -> None:
    """Let this application answer them."""
    for kind in STATUS:
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def status_of(error: Exception) -> int:
    """HTTP status of an exception."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


async def _on_error(_request: Request, error: Exception) -> JSONResponse:
    status = status_of(error)
    if isinstance(error, TxError):
        return reply(status, str(error), headers_of(error))
    log.warning("Database: %s", error)
    return reply(status, "The database is not available at the moment; try again.")


def headers_of(error: TxError) -> dict[str, str] | None:
    """What goes with the answer to an error."""
    if isinstance(error, Overloaded):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Unauthorized) and error.invalid_token:
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # clients get a new one and ask again
    return {"Connection": "close"} if isinstance(error, TooSlow) else None


async def _on_validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return reply(422, str(InvalidInput(str(first["loc"][-1]), first.get("input"), first["msg"])))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code in (404, 405):
        detail = f"{detail}: {request.method} {request.url.path} is not served here."
    return reply(error.status_code, detail)


def reply(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Every answer that is an error: one sentence, in FastAPI's form."""
    return JSONResponse({"detail": detail or "No details."}, status_code=status, headers=headers)
