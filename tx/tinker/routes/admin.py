"""Usage, audit log, telemetry, traces: what the owner of a server asks of it."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import ColumnElement, and_, or_, true
from sqlmodel import col, select

from tx.errors import InvalidInput
from tx.tinker import owners, telemetry, traces, usage
from tx.tinker.db import AuditEntry, now, reading
from tx.tinker.openapi import refuses
from tx.tinker.service import Api, Expires, Limit, Service, SessionId, Signature
from tx.tinker.wire import admin
from tx.tinker.wire.responses import timestamp

router = APIRouter()

Hour = Annotated[str, Query(description="A full hour, RFC 3339: 2026-07-13T00:00:00Z. Without a zone it is UTC.")]

MAX_USAGE_WINDOW = timedelta(days=14)
MAX_AUDIT_ENTRIES = 10_000
"""Of one day, in one reply; if there are more, the newest."""

TRACE_URL_LIFE_S = 3600
"""As the protocol says of the URLs of traces (§7)."""


@router.get("/billing/usage/events", response_model_exclude_none=True)
def usage_events(api: Api, starting_on: Hour, ending_before: Hour) -> admin.Usage:
    """Usage by UTC hour and session; the hour that runs counts as far as it has gone.

    Refused: a window that is not made of full UTC hours, is longer than 14 days, or begins in the future.
    """
    opens, closes = _full_hour("starting_on", starting_on), _full_hour("ending_before", ending_before)
    if opens > datetime.now(UTC):
        raise InvalidInput("starting_on", starting_on, "a time that is not in the future")
    if not opens < closes <= opens + MAX_USAGE_WINDOW:
        raise InvalidInput("ending_before", ending_before, "a time after starting_on, by at most 14 days")
    data = usage.events(api.db, int(opens.timestamp()), int(closes.timestamp()), _prices(api), now(), api.caller.owner)
    sessions = usage.user_metadata(api.db, [event.session_id for event in data if event.session_id is not None])
    return admin.Usage(data=data, sessions=sessions)


@router.get("/billing/usage/checkpoints/current", response_model_exclude_none=True)
def current_checkpoint_storage(
    api: Api, project_id: Annotated[str | None, Query(max_length=300)] = None
) -> admin.CheckpointStorage:
    """Checkpoints, their bytes and what they would cost in a month, by project."""
    prices = _prices(api)
    return admin.CheckpointStorage(
        data=usage.current_storage(api.db, prices, now(), project_id, api.caller.owner),
        effective_rate_usd_per_gigabyte_month=prices.storage,
    )


@router.get("/audit", response_model_exclude_none=True)
def audit_log(
    api: Api,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: Annotated[str | None, Query(description="YYYY-MM-DD, in UTC; today if it is not given.")] = None,
) -> admin.AuditLog:
    """The changes of one UTC day (default: today), sorted by time."""
    opens = datetime.combine(_day(day), time(), UTC).timestamp()
    own = _own_entries(api.caller.owner)
    query = select(AuditEntry).where(own, col(AuditEntry.at) >= opens, col(AuditEntry.at) < opens + 24 * usage.HOUR_S)
    if event_type != "all":
        query = query.where(AuditEntry.category == event_type)
    newest_first = query.order_by(col(AuditEntry.at).desc(), col(AuditEntry.id).desc()).limit(MAX_AUDIT_ENTRIES)
    with reading(api.db) as db:
        rows = db.exec(newest_first).all()
    return admin.AuditLog(entries=[_audit_entry(row) for row in reversed(rows)])


@router.get("/telemetry")
def read_telemetry(
    api: Api, session_id: Annotated[str | None, Query(max_length=300)] = None, limit: Limit = 100
) -> admin.ReportedEvents:
    """What clients reported last, of one session or of all, newest first. Not the protocol's: for the owner."""
    return admin.ReportedEvents(
        events=[
            admin.ReportedEvent(
                session_id=row.session_id,
                received_at=timestamp(row.received_at),
                severity=row.severity,
                event=row.event,
            )
            for row in telemetry.newest(api.db, session_id, limit, api.caller.owner)
        ]
    )


@router.get("/sessions/{session_id}/trace_export", responses=refuses(404))
def export_trace(api: Api, http: Request, session_id: SessionId) -> admin.TraceExport:
    """Where the trace is: on this server, under the address by which the client reached it, signed for an hour."""
    api.sessions.get(session_id)
    expires = int(now()) + TRACE_URL_LIFE_S
    signature = api.signer.sign(_trace_resource(session_id), expires)
    url = http.url_for("download_trace", session_id=session_id)
    return admin.TraceExport(url=str(url.include_query_params(expires=expires, signature=signature)))


@router.get("/files/{session_id}/trace", response_model=admin.Trace, responses=refuses(403, 404))
def download_trace(
    api: Api, session_id: SessionId, expires: Expires = "", signature: Signature = ""
) -> StreamingResponse:
    """The session's jobs in Chrome's trace format, for who has the signed URL that trace_export gives."""
    api.signer.check(_trace_resource(session_id), expires, signature)
    api.sessions.get(session_id)
    return StreamingResponse(traces.chrome_trace(api.db, session_id), media_type="application/json")


def _trace_resource(session_id: str) -> str:
    """What a signature is of; no file of a checkpoint is called so."""
    return f"{session_id}/trace"


def _own_entries(owner: str | None) -> ColumnElement[bool]:
    """What happened to a model of the owner's, whoever did it; of the rest, what he did himself."""
    if owner is None:
        return true()
    his_own = and_(col(AuditEntry.model_id).is_(None), col(AuditEntry.actor) == owner)
    return or_(owners.model_of_owner(AuditEntry.model_id, owner), his_own)


def _prices(api: Service) -> usage.Prices:
    config = api.config
    return usage.Prices(config.price_training, config.price_prefill, config.price_sample, config.price_storage)


def _full_hour(field: str, text: str) -> datetime:
    """An RFC 3339 time; one without a zone is UTC."""
    try:
        given = datetime.fromisoformat(text)
        given = (given if given.tzinfo is not None else given.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(field, text, "an RFC 3339 time such as 2026-07-13T00:00:00Z") from error
    if given != given.replace(minute=0, second=0, microsecond=0):
        raise InvalidInput(field, text, "a full UTC hour")
    return given


def _day(text: str | None) -> date:
    if text is None:
        return datetime.now(UTC).date()
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput("day", text, "a date such as 2026-07-13") from error


def _audit_entry(row: AuditEntry) -> admin.AuditEntry:
    about = {"model_id": row.model_id, "tinker_path": row.tinker_path}
    known = {key: value for key, value in about.items() if value is not None}
    return admin.AuditEntry(
        timestamp=timestamp(row.at),
        event=row.event.replace(".", "_", 1),  # checkpoint.publish: the protocol writes <resource>_<action>
        event_details={"actor": row.actor} | known | row.details,
        **known,
    )
