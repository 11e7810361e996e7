"""Which pending jobs are next: the oldest, or of each session in turn. Reads one index, and of that only what it needs.

A queue of 100,000 samples is no slower to take from than a short one: the sessions in it are found by jumping from one
to the next, and only the first few requests of each are looked at.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.engine import Connection
from sqlmodel import SQLModel

from tx.tinker.db import Job

_JOB = SQLModel.metadata.tables[str(Job.__tablename__)].c
_LIMIT: Any = bindparam("limit")


def any_pending(connection: Connection, base_model: str, kinds: Collection[str]) -> bool:
    """Whether any job of these kinds waits."""
    given = {"base_model": base_model, "kinds": list(kinds)}
    return connection.execute(_ANY, given).first() is not None


def oldest(connection: Connection, base_model: str, kinds: Collection[str], limit: int) -> list[int]:
    """Ids, ascending."""
    given = {"base_model": base_model, "kinds": list(kinds), "limit": limit}
    return list(connection.execute(_OLDEST, given).scalars())


def in_turn(connection: Connection, base_model: str, kinds: Collection[str], limit: int) -> list[int]:
    """Ids: the oldest of each session, then the second of each, and so on. Jobs of no session are one session's."""
    queues: defaultdict[str | None, list[int]] = defaultdict(list)
    for kind in kinds:
        given = {"base_model": base_model, "kind": kind, "limit": limit}
        for session_id, first in connection.execute(_FIRST_OF_SESSIONS, given):
            queues[session_id].append(first)
        if of_none := connection.execute(_OF_NO_SESSION, given).scalars().all():
            queues[None] += of_none
    if len(queues) < limit:  # with more, nobody has a second turn
        for session_id in queues.keys() - {None}:
            given = {"base_model": base_model, "kinds": list(kinds), "session_id": session_id, "limit": limit}
            queues[session_id] = list(connection.execute(_OF_SESSION, given).scalars())
    turns = ((turn, request_id) for queue in queues.values() for turn, request_id in enumerate(sorted(queue)))
    return [request_id for _, request_id in heapq.nsmallest(limit, turns)]


# ---- statements, made once: putting one together takes longer than running it ----------------------------------------

_PENDING = (_JOB.status == "pending", _JOB.base_model == bindparam("base_model"))
_OF_KINDS = select(_JOB.request_id).where(*_PENDING, _JOB.kind.in_(bindparam("kinds", expanding=True)))
_OF_KIND = select(_JOB.request_id).where(*_PENDING, _JOB.kind == bindparam("kind"))

_ANY = _OF_KINDS.limit(1)
_OLDEST = _OF_KINDS.order_by(_JOB.request_id).limit(_LIMIT)
_OF_SESSION = _OLDEST.where(_JOB.session_id == bindparam("session_id"))
_OF_NO_SESSION = _OF_KIND.where(_JOB.session_id.is_(None)).order_by(_JOB.request_id).limit(_LIMIT)


def _first_of_sessions() -> Any:
    """(session_id, first request_id) of every session that waits; a recursion, one session a step."""
    next_session = _OF_KIND.with_only_columns(func.min(_JOB.session_id))
    sessions = select(next_session.scalar_subquery().label("session_id")).cte("sessions", recursive=True)
    following = next_session.where(_JOB.session_id > sessions.c.session_id).correlate(sessions).scalar_subquery()
    sessions = sessions.union_all(select(following).where(sessions.c.session_id.is_not(None)))
    first = _OF_KIND.with_only_columns(func.min(_JOB.request_id)).where(_JOB.session_id == sessions.c.session_id)
    return select(sessions.c.session_id, first.correlate(sessions).scalar_subquery()).where(
        sessions.c.session_id.is_not(None)
    )


_FIRST_OF_SESSIONS = _first_of_sessions()
