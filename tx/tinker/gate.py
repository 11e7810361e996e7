"""What every request passes before a route sees it: who asks, what no address and no body may be, turns, a count."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tx.errors import InvalidInput, Overloaded, TooLarge, TooSlow, TxError, Unauthorized
from tx.tinker.auth import ANYBODY
from tx.tinker.http_errors import headers_of, reply, status_of
from tx.tinker.service import Service
from tx.tinker.slow_clients import body_deadline

log = logging.getLogger(__name__)

PREFIX = "/api/v1"
MAX_BODY_BYTES = 64 * 2**20
_DRAIN_BYTES = 2**30
"""How much of a body past the limit is read and thrown away, so that its sender gets to see the 413."""

_OPEN = {f"{PREFIX}/healthz", f"{PREFIX}/livez"}
_SIGNED = f"{PREFIX}/files/"
"""Paths that need no API key: these, and all that begin so, whose URLs are signed."""

_UNCOUNTED = f"{PREFIX}/session_heartbeat"
"""Never refused for its key's rate: a client that is told to wait is not one that has died."""

_NO_NUL = "text without NUL characters"

_IN_TURNS = {f"{PREFIX}/{name}" for name in ("asample", "forward_backward", "forward", "optim_step", "retrieve_future")}
"""Routes whose requests come by the thousand at once."""


class Gate:
    """Around everything: who asks, what no address and no body may be, turns, an answer for the unforeseen, a count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._admit(scope)
                _check_address(scope)
            except (Unauthorized, Overloaded, InvalidInput):
                await _read_body(receive, keep=False)  # who still writes would not read our answer
                raise
            body = await _read_body(receive)
            async with self._service.turns if scope["path"] in _IN_TURNS else contextlib.nullcontext():
                await self._app(scope, _replay(body, receive), counted_send)
        except TxError as error:  # ours: those of the routes are answered inside
            await reply(status_of(error), str(error), headers_of(error))(scope, receive, counted_send)
        except Exception:
            name = uuid.uuid4().hex[:8]
            log.exception("Request %s %s failed [%s]", scope["method"], scope["path"], name)
            if status == 0:
                await reply(500, f"Internal error {name}; the server's log has more.")(scope, receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._service.metrics.count("tx_http_requests_total", route=route, status=str(status))
            self._service.metrics.observe("tx_http_request_seconds", time.monotonic() - started, route=route)

    def _admit(self, scope: Scope) -> None:
        """Find the caller and note him for the routes; raises Unauthorized or Overloaded."""
        statuses, caller, auth = statuses_at_the_gate(scope["path"]), ANYBODY, self._service.auth
        if 401 in statuses:
            caller = auth.caller(dict(scope["headers"]))
        if 429 in statuses:
            auth.count(caller)
        scope.setdefault("state", {})["caller"] = caller


def statuses_at_the_gate(path: str) -> tuple[int, ...]:
    """How a request may be refused for its key, or for the rate of that."""
    if path in _OPEN or path.startswith(_SIGNED):
        return ()
    return (401,) if path == _UNCOUNTED else (401, 429)


def _check_address(scope: Scope) -> None:
    """Refuse NUL characters wherever a parameter can be: PostgreSQL can't even be asked for them."""
    if "\0" in scope["path"]:
        raise InvalidInput("path", scope["path"], _NO_NUL)
    if b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        raise InvalidInput("query", scope["query_string"].decode("latin-1"), _NO_NUL)
    for name, value in scope["headers"]:
        if b"\0" in value:
            raise InvalidInput(name.decode("latin-1"), value.decode("latin-1"), _NO_NUL)


async def _read_body(receive: Receive, *, keep: bool = True) -> bytes:
    """The whole body. One past the limit is read on and thrown away: who still writes would not read our answer.

    Raises:
        TooLarge, TooSlow: there is too much of it, or it takes too long.
    """
    parts: list[bytes] = []
    size, started = 0, asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(body_deadline(started, size)):
                message = await receive()
        except TimeoutError as error:
            raise TooSlow(f"body: {size} bytes came in time, and then no more. Send it again, faster.") from error
        if message["type"] != "http.request":
            return b""  # the client hung up; nobody will see the answer
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY_BYTES and keep:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > _DRAIN_BYTES:
            break
    if size > MAX_BODY_BYTES and keep:
        raise TooLarge("body", f"{size} bytes", f"at most {MAX_BODY_BYTES} bytes")
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
