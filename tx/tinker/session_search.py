"""Search sessions by what is known of them, and tell what became of each.

The status of a session is derived, in this order:

1. ``client_finished``: its client has finished it; the first end stays.
2. ``active``: it has given a heartbeat lately.
3. none: it has not, but the server has not been up for long enough to have heard one.
4. ``failed``: it has fallen silent, and the last of its requests that was answered (cancelled ones aside) failed.
5. ``cancelled``: it has fallen silent, and nothing failed: its client was stopped, or lost its way to the server.

A client that comes back makes its session active again.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, false, func, not_, or_
from sqlalchemy import select as select_columns
from sqlalchemy.engine import Engine as Database
from sqlalchemy.orm import aliased
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.tinker.checkpoint_rows import living
from tx.tinker.db import Checkpoint, Job, Model, Session, reading
from tx.tinker.wire import requests, responses

_ROWS_AT_ONCE = 500

_LAST = aliased(Job)
_LAST_ANSWERED = (
    select(_LAST.request_id)
    .where(
        col(_LAST.session_id) == col(Session.session_id),
        col(_LAST.finished_at).is_not(None),
        or_(col(_LAST.error).is_(None), not_(col(_LAST.error).startswith("Cancelled"))),
    )
    .order_by(col(_LAST.request_id).desc())
    .limit(1)
    .correlate(Session)
    .scalar_subquery()
)


def search(
    database: Database,
    request: requests.SearchSessions,
    *,
    at: float,
    active_since: float,
    silent_before: float,
    owner: str | None = None,
) -> responses.FoundSessions:
    """One page of the sessions that match, newest first.

    Args:
        at: now, in UTC seconds; checkpoints that have expired by then don't count.
        active_since: an open session with a heartbeat since then is active.
        silent_before: an open session without a heartbeat since then has fallen silent; at most ``active_since``.
        owner: who searches, and finds but his own; None: all are his.
    """
    with reading(database) as db:
        conditions = _conditions(db, request, active_since, silent_before)
        if owner is not None:
            conditions.append(col(Session.owner) == owner)
        ids = _matching(db, request, conditions)
        more = len(ids) > request.limit
        found = _summaries(db, ids[: request.limit], at, active_since, silent_before)
    if not more:
        return responses.FoundSessions(sessions=found)
    cursor = responses.SearchCursor(last_created_at=found[-1].created_at, last_session_id=found[-1].session_id)
    return responses.FoundSessions(sessions=found, next_cursor=cursor)


def _conditions(
    db: DbSession, request: requests.SearchSessions, active_since: float, silent_before: float
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if isinstance(request.owner, requests.SessionsOfUsers):
        conditions.append(col(Session.owner).in_(request.owner.owner_urns))
    if request.session_id is not None and request.display_name is None:
        conditions.append(col(Session.session_id) == request.session_id)
    if request.project_ids is not None:
        conditions.append(func.coalesce(col(Session.project_id), "").in_(request.project_ids))
    if request.statuses is not None:
        conditions.append(or_(false(), *(_has(status, active_since, silent_before) for status in request.statuses)))
    if request.cursor is not None:
        # The wire's times are rounded to microseconds, so the row that the cursor names says where it is.
        last = db.get(Session, request.cursor.last_session_id)
        created_at = request.cursor.last_created_at.timestamp() if last is None else last.created_at
        same_time = and_(
            col(Session.created_at) == created_at, col(Session.session_id) < request.cursor.last_session_id
        )
        conditions.append(or_(col(Session.created_at) < created_at, same_time))
    return conditions


def _has(
    status: requests.StatusQuery | requests.FinishedQuery, active_since: float, silent_before: float
) -> ColumnElement[bool]:
    finished = col(Session.finished_at).is_not(None)
    if isinstance(status, requests.FinishedQuery):
        return finished if status.reasons is None else and_(finished, col(Session.finish_reason).in_(status.reasons))
    if status.type == "active":
        return and_(not_(finished), col(Session.heartbeat_at) >= active_since)
    failed = select(Job.request_id).where(col(Job.request_id) == _LAST_ANSWERED, Job.status == "failed").exists()
    silent = and_(not_(finished), col(Session.heartbeat_at) < silent_before)
    return and_(silent, failed if status.type == "failed" else not_(failed))


def _matching(db: DbSession, request: requests.SearchSessions, conditions: Sequence[ColumnElement[bool]]) -> list[str]:
    """Ids of the first matches, one more than the limit if there are more.

    Names and metadata are compared here, row by row: SQLite folds the case of ASCII only, and the databases reach into
    JSON in different ways.
    """
    query = (
        select(Session.session_id, Session.display_name, Session.user_metadata)
        .where(*conditions)
        .order_by(col(Session.created_at).desc(), col(Session.session_id).desc())
    )
    words = request.display_name.casefold().split() if request.display_name is not None else None
    ids: list[str] = []
    with db.exec(query.execution_options(yield_per=_ROWS_AT_ONCE)) as rows:
        for session_id, display_name, user_metadata in rows:
            name = (display_name or "").casefold()
            if words is not None and session_id != request.session_id and not all(word in name for word in words):
                continue
            if any(user_metadata.get(key) != value for key, value in request.user_metadata.items()):
                continue
            ids.append(session_id)
            if len(ids) > request.limit:
                break
    return ids


def _summaries(
    db: DbSession, ids: Sequence[str], at: float, active_since: float, silent_before: float
) -> list[responses.SessionSummary]:
    rows = {row.session_id: row for row in db.exec(select(Session).where(col(Session.session_id).in_(ids))).all()}
    failures = _failures(db, [row.session_id for row in rows.values() if row.heartbeat_at < silent_before])
    counts = dict.fromkeys(ids, 0)
    sizes: dict[str, dict[str, int]] = {session_id: {} for session_id in ids}
    checkpoints = (
        select(Model.session_id, Checkpoint.folder, Checkpoint.size_bytes)
        .join(Model, col(Model.model_id) == col(Checkpoint.model_id))
        .where(col(Model.session_id).in_(ids), living(at))
    )
    for session_id, folder, size_bytes in db.exec(checkpoints):
        counts[session_id] += 1
        sizes[session_id][folder] = size_bytes  # copies share a folder: it is stored once
    return [
        responses.SessionSummary(
            session_id=session_id,
            created_at=responses.timestamp(rows[session_id].created_at),
            owner=rows[session_id].owner,
            project_id=rows[session_id].project_id or "",
            status=_status(rows[session_id], failures.get(session_id), active_since, silent_before),
            checkpoints_count=counts[session_id],
            checkpoint_storage_bytes=sum(sizes[session_id].values()),
            display_name=rows[session_id].display_name,
            user_metadata=rows[session_id].user_metadata or None,
        )
        for session_id in ids
    ]


def _failures(db: DbSession, session_ids: Sequence[str]) -> dict[str, responses.SessionFailed]:
    """By session: the failure that its last answered request was, if it was one."""
    query = (
        select_columns(
            col(Session.session_id),
            col(Job.request_id),
            col(Job.kind),
            col(Job.model_id),
            col(Job.seq_id),
            col(Job.category),
            col(Job.error),
        )
        .join(Job, col(Job.request_id) == _LAST_ANSWERED)
        .where(col(Session.session_id).in_(session_ids), col(Job.status) == "failed")
    )
    failures = {}
    for session_id, request_id, kind, model_id, seq_id, category, error in db.connection().execute(query):
        reason: responses.FailedRequest | responses.FailedTrainingRun
        if kind in ("create_model", "load_weights") and seq_id == 0:  # seq 0 is the model's creation
            reason = responses.FailedTrainingRun(training_run_id=model_id or "")
        else:
            reason = responses.FailedRequest(request_id=str(request_id), request_type=kind)
        failures[session_id] = responses.SessionFailed(
            category="user" if category == "user" else "internal", reason=reason, message=error or ""
        )
    return failures


def _status(
    session: Session, failure: responses.SessionFailed | None, active_since: float, silent_before: float
) -> responses.SessionStatus | None:
    if session.finished_at is not None:
        reason = responses.SessionFinishReason.model_validate({"type": session.finish_reason})
        return responses.SessionFinished(reason=reason, detail=session.finish_detail)
    if session.heartbeat_at >= active_since:
        return responses.SessionActive()
    if session.heartbeat_at >= silent_before:
        return None
    since = responses.timestamp(session.heartbeat_at).isoformat(timespec="seconds")
    return failure or responses.SessionCancelled(detail=f"No heartbeat since {since}.")
