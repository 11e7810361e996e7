"""The rows of checkpoints: find, list, publish, limit in time, delete, expire. Their files are the caller's to remove.

A change that a user may ask the audit log about adds its entry in the transaction that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import func, or_
from sqlalchemy.engine import Engine as Database
from sqlmodel import Session as DbSession
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from tx.errors import InvalidInput, NotFound
from tx.tinker import audit, owners
from tx.tinker.db import AuditEntry, Checkpoint, Model, now, reading, writing
from tx.tinker.wire import paths

_EXPIRE_AT_ONCE = 500
"""Folders per transaction, so that nobody waits long for the write lock."""


def living(at: float) -> Any:
    """Condition: not expired at ``at`` (UTC seconds)."""
    return or_(col(Checkpoint.expires_at).is_(None), col(Checkpoint.expires_at) > at)


def has_expired(checkpoint: Checkpoint, at: float) -> bool:
    """The opposite of ``living``, of a row."""
    return checkpoint.expires_at is not None and checkpoint.expires_at <= at


def at_path(path: paths.TinkerPath) -> SelectOfScalar[Checkpoint]:
    """The query of the one row that a path names, expired or not."""
    return select(Checkpoint).where(
        Checkpoint.model_id == path.model_id, Checkpoint.kind == path.kind, Checkpoint.name == path.name
    )


class CheckpointRows:
    """The verbs. Any thread may call them; each call is one transaction, except ``expire``.

    What has expired is not found any more, whether or not it has been swept.

    Args:
        clock: UTC seconds since the epoch, to judge expiry by.
        owner: whose checkpoints these are; None: everybody's.
    """

    def __init__(self, db: Database, clock: Callable[[], float] = now, owner: str | None = None) -> None:
        self._db = db
        self._clock = clock
        self._owner = owner

    def page(
        self, limit: int, offset: int, kinds: Collection[str] = paths.PATH_KINDS
    ) -> tuple[Sequence[Checkpoint], int]:
        """Checkpoints of all models, newest first, and how many there are on all pages."""
        own = owners.model_of_owner(Checkpoint.model_id, self._owner)
        query = select(Checkpoint).where(living(self._clock()), col(Checkpoint.kind).in_(kinds), own)
        with reading(self._db) as db:
            total = db.exec(select(func.count()).select_from(query.subquery())).one()
            ordered = query.order_by(col(Checkpoint.created_at).desc(), col(Checkpoint.id).desc())
            return db.exec(ordered.limit(limit).offset(offset)).all(), total

    def of_model(self, model_id: str, kinds: Collection[str] = paths.PATH_KINDS) -> Sequence[Checkpoint]:
        """All checkpoints of one model, oldest first; raises NotFound if there is no such model."""
        query = select(Checkpoint).where(
            Checkpoint.model_id == model_id, living(self._clock()), col(Checkpoint.kind).in_(kinds)
        )
        own = select(Model.model_id).where(
            Model.model_id == model_id, owners.session_of_owner(Model.session_id, self._owner)
        )
        with reading(self._db) as db:
            if db.exec(own).first() is None:
                raise NotFound("training_run_id", model_id, "a training run of this server")
            return db.exec(query.order_by(col(Checkpoint.created_at), col(Checkpoint.id))).all()

    def publish(self, model_id: str, checkpoint_id: str, public: bool) -> None:
        """Make a checkpoint public, or private again; it may be so already.

        Raises:
            InvalidInput, NotFound: no checkpoint can have this id, or none has.
        """
        with writing(self._db) as db:
            row = self._find(db, model_id, checkpoint_id)
            if row.public != public:
                row.public = public
                db.add(_entry("publish" if public else "unpublish", row, self._owner))

    def set_ttl(self, model_id: str, checkpoint_id: str, ttl_s: float | None) -> None:
        """Let a checkpoint expire ``ttl_s`` seconds from now, or never; raises as ``publish``."""
        with writing(self._db) as db:
            row = self._find(db, model_id, checkpoint_id)
            row.expires_at = None if ttl_s is None else self._clock() + ttl_s
            db.add(_entry("set_ttl", row, self._owner, ttl_seconds=ttl_s, expires_at=row.expires_at))

    def delete(self, model_id: str, checkpoint_id: str) -> Checkpoint | None:
        """Delete the row; returns it if its files are to go too: copies keep what they share. Raises as ``publish``."""
        with writing(self._db) as db:
            found = self._find(db, model_id, checkpoint_id, Checkpoint.id, Checkpoint.folder)
            gone = _delete(db, {found.folder}, lambda row: row.id == found.id, "delete", self._owner)
        return gone[0] if gone else None

    def expire(self) -> list[Checkpoint]:
        """Delete the rows of all that has expired; returns those whose files are to go too."""
        at = self._clock()
        query = select(Checkpoint.folder).where(~living(at)).distinct().limit(_EXPIRE_AT_ONCE)

        gone: list[Checkpoint] = []
        while True:
            with writing(self._db) as db:
                folders = set(db.exec(query).all())
                gone += _delete(db, folders, lambda row: has_expired(row, at), "expire", None)
            if len(folders) < _EXPIRE_AT_ONCE:
                return gone

    def _find(self, db: DbSession, model_id: str, checkpoint_id: str, *columns: Any) -> Any:
        """The row, locked; or these columns of it, not locked."""
        kind, _, name = checkpoint_id.partition("/")
        if kind not in paths.PATH_KINDS:
            raise InvalidInput("checkpoint_id", checkpoint_id, f"<{'|'.join(paths.PATH_KINDS)}>/<name>")
        query = (select(*columns) if columns else select(Checkpoint).with_for_update()).where(
            Checkpoint.model_id == model_id,
            Checkpoint.kind == kind,
            Checkpoint.name == paths.check_name(name, "checkpoint_id"),
            living(self._clock()),
            owners.model_of_owner(Checkpoint.model_id, self._owner),
        )
        found = db.exec(query).first()
        if found is None:
            raise NotFound("checkpoint_id", checkpoint_id, "a checkpoint of this training run")
        return found


def _delete(
    db: DbSession, folders: Collection[str], condemned: Callable[[Checkpoint], bool], event: str, actor: str | None
) -> list[Checkpoint]:
    """Delete the condemned rows of these folders; those of them, one per folder, whose folder no other row names."""
    # All rows of a folder are locked, in one order: of two deletions at once, the second sees that it is the last.
    query = select(Checkpoint).where(col(Checkpoint.folder).in_(folders)).order_by(col(Checkpoint.id))
    gone = {}
    for row in db.exec(query.with_for_update()).all():
        if condemned(row):
            gone[row.folder] = row
            db.delete(row)
            db.add(_entry(event, row, actor, size_bytes=row.size_bytes))
    db.flush()
    # Asked again: on PostgreSQL the query above does not see a copy that was made while it waited for its locks.
    kept = set(db.exec(select(Checkpoint.folder).where(col(Checkpoint.folder).in_(gone))).all())
    return [row for folder, row in gone.items() if folder not in kept]


def _entry(event: str, row: Checkpoint, actor: str | None, **details: Any) -> AuditEntry:
    path = f"tinker://{row.model_id}/{row.kind}/{row.name}"
    return audit.entry("checkpoints", f"checkpoint.{event}", actor, model_id=row.model_id, tinker_path=path, **details)
