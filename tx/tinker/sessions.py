"""Sessions, models and samplers: create once, look up, keep alive, finish. Jobs are in ``tx.tinker.jobs``.

To one owner (``tx.tinker.owners``) what belongs to another does not exist, but for checkpoints that are published.
A retried creation returns what the first one made: sessions by their idempotency key, samplers by their number.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from typing import cast

from sqlalchemy import bindparam, update
from sqlalchemy import select as select_columns
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import IntegrityError
from sqlmodel import SQLModel, col, or_, select

from tx.errors import InvalidInput, NotFound
from tx.tinker import audit, checkpoint_rows, owners
from tx.tinker.db import LOCAL, Checkpoint, Model, Sampler, Session, now, reading, writing
from tx.tinker.wire import paths

EXPIRED_AFTER_S = 120.0
"""A client sends a heartbeat every 10 s and warns its user when none has got through for so long (protocol §2.1).
A session without one for so long has expired; it still takes requests."""

# Made once: every request of a model asks, and to put it together would take twice as long as to run it.
_MODEL_AND_SESSION = (
    select(Model, Session)
    .join(Session, col(Session.session_id) == col(Model.session_id), isouter=True)
    .where(col(Model.model_id) == bindparam("model_id"))
)
_SAMPLER = SQLModel.metadata.tables[str(Sampler.__tablename__)]
_SESSION = SQLModel.metadata.tables[str(Session.__tablename__)]
_THESE = _SESSION.c.session_id.in_(bindparam("ids", expanding=True))
_HEARTBEAT = update(_SESSION).where(_THESE, _SESSION.c.finished_at.is_(None)).values(heartbeat_at=bindparam("time"))
_SAMPLER_AND_SESSION = (
    select_columns(_SAMPLER, _SESSION.c.finished_at, _SESSION.c.owner)
    .join(_SESSION, _SESSION.c.session_id == _SAMPLER.c.session_id, isouter=True)
    .where(_SAMPLER.c.sampler_id == bindparam("sampler_id"))
)
_OWNERS_AND_ENDS = select_columns(_SESSION.c.session_id, _SESSION.c.owner, _SESSION.c.finished_at).where(_THESE)

_IDS_PER_QUERY = 500
"""SQLite bounds the variables of one statement."""

type Beat = tuple[str, str | None]
"""A session, and the owner whom its caller is bound to."""


class Sessions:
    """The verbs. Any thread may call them; each call is one transaction.

    Args:
        clock: UTC seconds since the epoch, for heartbeats, ends and expiry.
        owner: whose sessions these are; None: everybody's.
    """

    def __init__(self, db: Database, clock: Callable[[], float] = now, owner: str | None = None) -> None:
        self._db = db
        self._clock = clock
        self._owner = owner

    def create(self, session: Session) -> str:
        """Store a new session under a fresh id; a retry (same idempotency key) gets the first one's id."""
        session.session_id = f"sess-{uuid.uuid4().hex[:20]}"
        session.owner = self._owner or LOCAL
        key = owners.idempotency_key(self._owner, session.idempotency_key)
        try:
            with writing(self._db) as db:
                if key is not None:
                    first = db.exec(select(Session.session_id).where(Session.idempotency_key == key)).first()
                    if first is not None:
                        return first
                session.idempotency_key = key
                db.add(session)
        except IntegrityError:  # another API process was faster with the same key
            with reading(self._db) as db:
                return db.exec(select(Session.session_id).where(Session.idempotency_key == key)).one()
        return session.session_id

    def get(self, session_id: str) -> Session:
        """A session, finished or not."""
        with reading(self._db) as db:
            return self._own(db.get(Session, session_id), session_id)

    def get_open(self, session_id: str) -> Session:
        """A session that still takes requests."""
        return _open(self.get(session_id))

    def heartbeat(self, *session_ids: str) -> dict[str, bool]:
        """Note that these clients live; by session that there is, whether it is open still."""
        beats = self.heartbeats([(session_id, self._owner) for session_id in session_ids])
        return {session_id: is_open for (session_id, _), is_open in beats.items()}

    def heartbeats(self, beats: Collection[Beat]) -> dict[Beat, bool]:
        """As ``heartbeat``, of many owners at once: those of sessions that are not their caller's are left out."""
        known: dict[Beat, bool] = {}
        by_session: dict[str, set[Beat]] = {}
        for beat in beats:
            by_session.setdefault(beat[0], set()).add(beat)
        session_ids = list(by_session)
        for start in range(0, len(session_ids), _IDS_PER_QUERY):
            chunk = session_ids[start : start + _IDS_PER_QUERY]
            with writing(self._db) as db:
                own = {
                    beat: finished_at is None
                    for session_id, owner, finished_at in db.connection().execute(_OWNERS_AND_ENDS, {"ids": chunk})
                    for beat in by_session[session_id]
                    if beat[1] in (None, owner)
                }
                alive = {"ids": list({session_id for session_id, _ in own}), "time": self._clock()}
                db.connection().execute(_HEARTBEAT, alive)
            known |= own
        return known

    def finish(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; the first end stays."""
        with writing(self._db) as db:
            session = self._own(db.get(Session, session_id), session_id)
            if session.finished_at is None:
                session.finished_at, session.finish_reason, session.finish_detail = self._clock(), reason, detail

    def assign_project(self, session_id: str, project_id: str) -> None:
        """Put a session, and with it all that it made, into a project, from wherever it is."""
        with writing(self._db) as db:
            session = self._own(db.get(Session, session_id, with_for_update=True), session_id)
            if session.project_id != project_id:
                details = {"session_id": session_id, "project_id": project_id, "previous": session.project_id}
                db.add(audit.entry("projects", "session.assign_project", self._owner, **details))
                session.project_id = project_id

    def model(self, model_id: str, field: str = "model_id") -> Model:
        """A model, whatever became of its session."""
        return self._model(model_id, field)[0]

    def model_for_work(self, model_id: str) -> Model:
        """A model that still takes jobs."""
        model, session = self._model(model_id, "model_id")
        if model.state == "copy":
            accepted = "a model that can be trained on; this one only holds a copy: load that into a model of its own"
            raise InvalidInput("model_id", model_id, accepted)
        if session is not None:
            _open(session)
        return model

    def idle_models(self, model_ids: Collection[str], before: float) -> list[str]:
        """Those of these models whose session has finished, or has had no heartbeat since then."""
        over = or_(col(Session.finished_at).is_not(None), col(Session.heartbeat_at) < before)
        query = select(Model.model_id).join(Session, col(Session.session_id) == col(Model.session_id))
        with reading(self._db) as db:
            return list(db.exec(query.where(col(Model.model_id).in_(model_ids), over)).all())

    def sampler(self, sampler_id: str) -> Sampler:
        """A sampler, whatever became of its session."""
        return self._sampler(sampler_id)[0]

    def sampler_for_work(self, sampler_id: str) -> Sampler:
        """A sampler that still takes jobs."""
        sampler, finished_at = self._sampler(sampler_id)
        _require_open(sampler.session_id, finished_at)
        return sampler

    def create_sampler(self, sampler: Sampler) -> Sampler:
        """Store a sampler; a retry (same session and number, same weights) gets the first one."""
        try:
            with writing(self._db) as db:
                _open(self._own(db.get(Session, sampler.session_id), sampler.session_id))
                first = db.get(Sampler, sampler.sampler_id)
                if first is None:
                    db.add(sampler.model_copy())
        except IntegrityError:  # another API process was faster with the same number
            first = self.sampler(sampler.sampler_id)
        if first is None:
            return sampler
        same = (first.model_path, first.base_model, first.kind) == (
            sampler.model_path,
            sampler.base_model,
            sampler.kind,
        )
        if not same:
            raise InvalidInput("sampling_session_seq_id", sampler.seq, "a number that this session has not used yet")
        return first

    def join_sampler(self, sampler_id: str) -> int:
        """Count one more copy of a sampler's client; its number, which nobody else gets."""
        self.sampler_for_work(sampler_id)
        joined = update(Sampler).where(col(Sampler.sampler_id) == sampler_id)
        joined = joined.values(num_clones=col(Sampler.num_clones) + 1).returning(col(Sampler.num_clones))
        with writing(self._db) as db:
            return db.connection().execute(joined).scalar_one()

    def checkpoint(self, path: paths.TinkerPath, field: str = "path") -> tuple[Checkpoint, Model]:
        """A finished checkpoint, published if it is another's, and the model that it was saved from."""
        with reading(self._db) as db:
            checkpoint = db.exec(checkpoint_rows.at_path(path)).first()
            found = db.execute(_MODEL_AND_SESSION, {"model_id": path.model_id}).first()
        model, session = found or (None, None)
        hidden = checkpoint is not None and not checkpoint.public and not self._is_own(session)
        expired = checkpoint is not None and checkpoint_rows.has_expired(checkpoint, self._clock())
        if checkpoint is None or model is None or expired or hidden:
            raise NotFound(field, str(path), "the path of a checkpoint on this server")
        return checkpoint, model

    def may_load(self, path: paths.TinkerPath, field: str = "path") -> None:
        """Refuse another's checkpoint. One's own need not be there yet: the job that saves it may still wait.

        Raises:
            NotFound: the model is another's, or there is none, and no published checkpoint has this path.
        """
        if self._owner is None:
            return
        with reading(self._db) as db:
            found = db.execute(_MODEL_AND_SESSION, {"model_id": path.model_id}).first()
        if found is None or not self._is_own(found[1]):
            self.checkpoint(path, field)

    def recent(self, limit: int, offset: int) -> list[str]:
        """Ids of the newest sessions."""
        query = select(Session.session_id).order_by(col(Session.created_at).desc(), Session.session_id)
        if self._owner is not None:
            query = query.where(Session.owner == self._owner)
        with reading(self._db) as db:
            return list(db.exec(query.limit(limit).offset(offset)).all())

    def contents(self, session_id: str) -> tuple[list[str], list[str]]:
        """Ids of the models and samplers of a session."""
        models = select(Model.model_id).where(Model.session_id == session_id).order_by(col(Model.model_seq_id))
        samplers = select(Sampler.sampler_id).where(Sampler.session_id == session_id).order_by(col(Sampler.seq))
        with reading(self._db) as db:
            return list(db.exec(models).all()), list(db.exec(samplers).all())

    def _is_own(self, session: Session | None) -> bool:
        return self._owner is None or (session is not None and session.owner == self._owner)

    def _own(self, session: Session | None, session_id: str) -> Session:
        if session is None or not self._is_own(session):
            raise NotFound("session_id", session_id, "a session of this server")
        return session

    def _model(self, model_id: str, field: str) -> tuple[Model, Session | None]:
        with reading(self._db) as db:
            found = db.execute(_MODEL_AND_SESSION, {"model_id": model_id}).first()
        if found is None or not self._is_own(found[1]):
            accepted = "a training run of this server" if field == "training_run_id" else "a model of this server"
            raise NotFound(field, model_id, accepted)
        return cast(tuple[Model, Session | None], tuple(found))

    def _sampler(self, sampler_id: str) -> tuple[Sampler, float | None]:
        """And when its session was finished."""
        with reading(self._db) as db:
            found = db.connection().execute(_SAMPLER_AND_SESSION, {"sampler_id": sampler_id}).mappings().first()
        if found is None or self._owner not in (None, found["owner"]):
            raise NotFound("sampling_session_id", sampler_id, "a sampling session of this server")
        columns = dict(found)
        del columns["owner"]
        finished_at: float | None = columns.pop("finished_at")
        return Sampler(**columns), finished_at


def _open(session: Session) -> Session:
    _require_open(session.session_id, session.finished_at)
    return session


def _require_open(session_id: str, finished_at: float | None) -> None:
    if finished_at is not None:
        raise InvalidInput("session_id", session_id, "a session that its client has not finished")
