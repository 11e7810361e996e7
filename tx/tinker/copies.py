"""Copies of checkpoints: rows only, the files are shared with the source and go with the last row that names them.

A copy belongs to a model of its own, which holds nothing else and can't be trained on (its state is ``copy``). Where no
session is given for that model, it gets one of its own, in the destination project and finished from the start. What
can be done with a checkpoint can be done with its copy: sample, load, export, publish, delete.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from sqlalchemy import or_
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.errors import InvalidInput, NotFound
from tx.tinker import audit, owners
from tx.tinker.checkpoint_rows import at_path, has_expired
from tx.tinker.db import LOCAL, Checkpoint, Model, Session, now, writing
from tx.tinker.wire import paths
from tx.tinker.wire.paths import TinkerPath

_ATTEMPTS = 5


@dataclass(frozen=True)
class CopyRequest:
    """What to copy and where to: into model ``model_seq_id`` of a session, or into a session of its own."""

    source: TinkerPath
    session_id: str | None = None
    model_seq_id: int = 0
    project_id: str | None = None  # of the session that is made, if any
    ttl_s: int | None = None  # None: the copy never expires, whatever its source does
    idempotency_key: str | None = None
    owner: str | None = None  # who copies: what is his own or published; None: anything


def copy_checkpoint(db: Database, request: CopyRequest) -> TinkerPath:
    """Copy, in one transaction, and return the copy's path. A retry (same key, or same model) gets the first one's.

    Raises:
        NotFound: there is no such source (any more) or no such session.
        InvalidInput: the session is finished, or the key or the model's number is taken by something else.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with writing(db) as session:
                return _retried(session, request) or _copy(session, request)
        except IntegrityError:
            # Another API process made the same copy between our look and our insert: look again.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _retried(session: DbSession, request: CopyRequest) -> TinkerPath | None:
    """The copy that this very request has made before."""
    key = owners.idempotency_key(request.owner, request.idempotency_key)
    if key is None:
        return None
    query = select(Checkpoint).where(Checkpoint.idempotency_key == key)
    first = session.exec(query).first()
    if first is None:
        return None
    owner = session.get(Model, first.model_id)
    if owner is None or owner.source_path != str(request.source):
        raise InvalidInput("X-Idempotency-Key", request.idempotency_key, "a key that no other copy was made with")
    return _path(first)


def _copy(session: DbSession, request: CopyRequest) -> TinkerPath:
    # Locked (PostgreSQL), so that its files can't go between this look and the row that shares them.
    own = owners.model_of_owner(Checkpoint.model_id, request.owner)
    seen = at_path(request.source).where(or_(col(Checkpoint.public), own))
    source = session.exec(seen.with_for_update()).first()
    source_model = session.get(Model, request.source.model_id)
    created = now()
    if source is None or source_model is None or has_expired(source, created):
        raise NotFound("source_path", str(request.source), "the path of a checkpoint on this server")
    session_id = _session(session, request, created)
    model_id = paths.model_id(session_id, request.model_seq_id)
    owner = session.get(Model, model_id)
    if owner is not None:
        copied = session.exec(select(Checkpoint).where(Checkpoint.model_id == model_id)).first()
        if owner.state != "copy" or owner.source_path != str(request.source) or copied is None:
            raise InvalidInput("model_seq_id", request.model_seq_id, "a number that this session has not used yet")
        return _path(copied)
    shape = source_model.model_dump()
    shape.update(model_id=model_id, session_id=session_id, model_seq_id=request.model_seq_id, state="copy")
    shape.update(source_path=str(request.source), created_at=created, last_request_at=created)
    session.add(Model(**shape))
    values = source.model_dump(exclude={"id"})
    values.update(model_id=model_id, created_at=created, public=False, seq_id=None)
    values.update(expires_at=None if request.ttl_s is None else created + request.ttl_s)
    values.update(idempotency_key=owners.idempotency_key(request.owner, request.idempotency_key))
    copy = Checkpoint(**values)
    session.add(copy)
    path = _path(copy)
    session.add(
        audit.entry(
            "checkpoints",
            "checkpoint.copy",
            request.owner,
            model_id=model_id,
            tinker_path=str(path),
            source=str(request.source),
        )
    )
    return path


def _session(session: DbSession, request: CopyRequest, created: float) -> str:
    """The session that owns the copy: an open one that the client named, or a new one."""
    if request.session_id is not None:
        given = session.get(Session, request.session_id)
        if given is None or request.owner not in (None, given.owner):
            raise NotFound("session_id", request.session_id, "a session of this server")
        if given.finished_at is not None:
            raise InvalidInput("session_id", request.session_id, "a session that its client has not finished")
        return request.session_id
    made = Session(
        session_id=f"sess-{uuid.uuid4().hex[:20]}",
        created_at=created,
        heartbeat_at=created,
        finished_at=created,
        finish_reason="success",
        finish_detail=f"holds a copy of {request.source}",
        project_id=request.project_id,
        owner=request.owner or LOCAL,
    )
    session.add(made)
    return made.session_id


def _path(row: Checkpoint) -> TinkerPath:
    return TinkerPath(row.model_id, row.kind, row.name)  # type: ignore[arg-type]
