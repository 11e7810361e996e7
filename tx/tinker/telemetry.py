"""What clients report of themselves: kept for the owner to read, within bounds, and never worth an error to a client.

Whatever comes is taken as far as it can be read. A session keeps its newest ``MAX_OF_SESSION`` events, the database
its newest ``MAX_EVENTS``, and an event no more than ``MAX_EVENT_BYTES``: a flood costs its own older events, and at
most some 160 MB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, text
from sqlalchemy.engine import Engine as Database
from sqlmodel import col, select

from tx.tinker import owners
from tx.tinker.db import Session, TelemetryEvent, now, reading, writing

MAX_OF_BATCH = 100
"""What the SDK sends at once (protocol §2.1); of a longer batch the rest is dropped."""

MAX_OF_SESSION = 500
MAX_EVENTS = 10_000
MAX_EVENT_BYTES = 16 * 2**10

EVENTS = ("SESSION_START", "SESSION_END", "UNHANDLED_EXCEPTION", "GENERIC_EVENT")
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_OF_BATCH = ("sdk_version", "platform", "process_uuid")
"""What a batch says once for all its events; kept with each."""

_CUT_CHARS = {"error_message": 500, "traceback": 1000}
_CUT_REST_CHARS = 60
_KEPT_OF_LONG = ("event", "event_id", "event_name", "error_type", "error_message", "timestamp", "duration", *_OF_BATCH)

_MAX_DEPTH = 50
"""Of lists and objects in one another; who writes JSON gives up somewhere."""

_TRIM_LOCK = 0x7478_0003
"""Key of the PostgreSQL advisory lock under which old events are deleted, so that two deletions can't dead-lock."""


@dataclass(frozen=True)
class Batch:
    """One report, as far as it could be read. ``num_dropped``: events that were none, or too many."""

    session_id: str
    events: Sequence[dict[str, Any]]
    num_dropped: int


def read(body: bytes) -> Batch:
    """A request body, whatever it is."""
    try:
        report = json.loads(body, parse_constant=str, parse_float=_finite)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        return Batch("", (), 0)
    sent = report.get("events")
    sent = sent if isinstance(sent, list) else []
    common = {key: _text(report[key], _CUT_REST_CHARS) for key in _OF_BATCH if isinstance(report.get(key), str)}
    events = [_fit(common | event) for event in sent[:MAX_OF_BATCH] if isinstance(event, dict)]
    return Batch(_text(report.get("session_id"), 300), events, len(sent) - len(events))


def severity_of(event: dict[str, Any]) -> str:
    """One of ``SEVERITIES``."""
    return event["severity"] if event.get("severity") in SEVERITIES else "INFO"


def kind_of(event: dict[str, Any]) -> str:
    """One of ``EVENTS``, or "other"."""
    return event["event"] if event.get("event") in EVENTS else "other"


def keep(db: Database, batch: Batch, owner: str | None = None) -> None:
    """Store a batch; what is too many then, of its session and of all, goes, the oldest first.

    Of an ``owner`` only what is said of one of his own sessions: nobody else could read it.
    """
    if not batch.events or not _is_own(db, batch.session_id, owner):
        return
    received_at = now()
    rows = [
        {"session_id": batch.session_id, "received_at": received_at, "severity": severity_of(event), "event": event}
        for event in batch.events
    ]
    of_session = col(TelemetryEvent.session_id) == batch.session_id
    with writing(db) as session:
        if session.get_bind().dialect.name == "postgresql":
            session.connection().execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _TRIM_LOCK})
        session.connection().execute(insert(TelemetryEvent), rows)
        for limit, group in ((MAX_OF_SESSION, [of_session]), (MAX_EVENTS, [])):
            # Counted first: it reads an index alone, and there is mostly nothing to delete.
            count = session.exec(select(func.count()).select_from(TelemetryEvent).where(*group)).one()
            if count > limit:
                oldest = select(TelemetryEvent.id).where(*group).order_by(col(TelemetryEvent.id)).limit(count - limit)
                session.exec(delete(TelemetryEvent).where(col(TelemetryEvent.id).in_(oldest)))


def newest(db: Database, session_id: str | None, limit: int, owner: str | None = None) -> list[TelemetryEvent]:
    """What a session, or all of the owner's, or everybody, reported last; newest first."""
    own = owners.session_of_owner(TelemetryEvent.session_id, owner)
    query = select(TelemetryEvent).where(own).order_by(col(TelemetryEvent.id).desc()).limit(limit)
    if session_id is not None:
        query = query.where(TelemetryEvent.session_id == session_id)
    with reading(db) as session:
        return list(session.exec(query).all())


def _is_own(db: Database, session_id: str, owner: str | None) -> bool:
    if owner is None:
        return True
    with reading(db) as session:
        row = session.get(Session, session_id)
    return row is not None and row.owner == owner


def _text(value: Any, limit: int) -> str:
    """A string that every database takes: no NUL, no half of a surrogate pair."""
    text = value if isinstance(value, str) else ""
    return text[:limit].replace("\0", "").encode("utf-8", "replace").decode()


def _fit(event: dict[str, Any]) -> dict[str, Any]:
    """An event as it came; of one that is too long or too deep, what tells most."""
    if _is_shallow(event, _MAX_DEPTH):
        event = _clean(event)
        if len(json.dumps(event)) <= MAX_EVENT_BYTES:
            return event
    cut: dict[str, Any] = {
        key: event[key][: _CUT_CHARS.get(key, _CUT_REST_CHARS)]
        for key in _KEPT_OF_LONG
        if isinstance(event.get(key), str)
    }
    if isinstance(event.get("traceback"), str):
        cut["traceback"] = event["traceback"][-_CUT_CHARS["traceback"] :]  # its end says what went wrong
    return _clean(cut) | {"severity": severity_of(event), "cut": True}


def _clean(event: dict[str, Any]) -> dict[str, Any]:
    """Without halves of surrogate pairs, which can't be sent back."""
    cleaned: dict[str, Any] = json.loads(json.dumps(event, ensure_ascii=False).encode("utf-8", "replace"))
    return cleaned


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _finite(text: str) -> float | str:
    """A number; one past the range of floats, which JSON can't write again, as its text."""
    return number if math.isfinite(number := float(text)) else text
