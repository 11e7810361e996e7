"""Limits for what a client sends: who sends nothing, a byte now and then, or headers without end, is cut off.

Nothing here limits how long an answer may take: long polls wait for theirs with a finished request behind them.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_S = 20.0
"""From the connection, or the first byte of a further request on it, to the end of the request's headers."""

MAX_HEADERS_BYTES = 64 * 2**10

BODY_S = 30.0
MIN_BODY_BYTES_PER_S = 16 * 2**10
"""A body has ``BODY_S``, and a second more for each so many bytes that have come."""


def body_deadline(started: float, num_bytes: int) -> float:
    """Until when the next piece of a body must be there, on the clock of ``started``; ``num_bytes`` have come."""
    return started + BODY_S + num_bytes / MIN_BODY_BYTES_PER_S


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits for headers: of their size it has none, and its time-outs begin after the first answer."""

    _headers_timer: asyncio.TimerHandle | None = None
    _headers_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Headers must come, from now."""
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Of whatever."""
        super().data_received(data)
        self._headers_bytes = self._headers_bytes + len(data) if self._awaits_headers() else 0
        if self._headers_bytes > MAX_HEADERS_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's headers are more than {MAX_HEADERS_BYTES} bytes.")
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """No more."""
        super().connection_lost(exc)
        self._clear_timer()

    def _set_timer(self) -> None:
        """Runs while no request is under way and some of one has come, or nothing ever has."""
        if not self._awaits_headers():
            self._clear_timer()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_S, self._give_up)

    def _clear_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _give_up(self) -> None:
        self._headers_timer = None
        if self._awaits_headers():
            self.transport.close()

    def _awaits_headers(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete
