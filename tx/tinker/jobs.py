"""The log of jobs: append, claim, commit, fail, requeue, cancel, prune. Every verb that changes a job is here.

::

    append ─▶ pending ─claim─▶ running ─commit─▶ done
                 │  ▲             │
                 │  └──requeue────┤          (a crash put it back)
                 └──fail, cancel──┴─fail──▶ failed

done and failed are final: an outcome that arrives for a finished job is dropped. The unique keys of ``tx.tinker.db``
make a retried request find its first row. No HTTP, no scheduling, no decoding of payloads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from sqlalchemy import CursorResult, func, or_, update
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session as DbSession
from sqlmodel import SQLModel, col, select

from tx.errors import InvalidInput
from tx.tinker.db import Checkpoint, Job, Sampler, now, reading, writing
from tx.tinker.notify import ChangeSignal

JOB_KINDS = (
    "create_model",
    "load_weights",
    "unload_model",
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "sample",
)
"""Every value of ``Job.kind``. create_model and create-via-load (load_weights) are seq 0 of their model."""

Category = Literal["user", "server"]

_IDS_PER_QUERY = 500
"""SQLite bounds the variables of one statement."""


@dataclass(frozen=True)
class NewJob:
    """A request to append. ``error``: well-formed but already known to be wrong; it is appended as failed."""

    kind: str
    base_model: str
    payload: bytes
    session_id: str | None = None
    model_id: str | None = None
    sampler_id: str | None = None
    seq_id: int | None = None
    payload_type: str = "application/json"
    payload_encoding: str | None = None
    fingerprint: str = ""
    tokens_in: int = 0
    rows: tuple[SQLModel, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Appended:
    """Where a request stands: ``created`` is False for a retry that found its first row."""

    request_id: int
    created: bool


@dataclass(frozen=True)
class Outcome:
    """A job that went well: what the future will say, and rows that must appear in the same instant."""

    request_id: int
    result: bytes
    result_type: str = "application/json"
    tokens_in: int = 0
    tokens_out: int = 0
    rows: Sequence[SQLModel] = field(default=())


class JobTable:
    """The verbs. Any thread may call them; each call is one transaction."""

    def __init__(self, db: Database, signal: ChangeSignal | None = None) -> None:
        self._db = db
        self._signal = signal

    def append(self, jobs: Sequence[NewJob]) -> list[Appended | InvalidInput]:
        """Append all of them in one transaction; each one's outcome, in order. A bad one doesn't stop the others."""
        for attempt in range(5):
            try:
                with writing(self._db) as session:
                    answers = [_append_one(session, job) for job in jobs]
                break
            except IntegrityError:
                # Another API process appended the same request between our look and our insert: look again.
                if attempt == 4:
                    raise
        self._announce()
        return answers

    def claim(self, base_model: str, limit: int, kinds: Collection[str] | None = None) -> list[Job]:
        """The oldest pending jobs of one base model, now running, in order of request_id."""
        pending = select(Job.request_id).where(Job.status == "pending", Job.base_model == base_model)
        if kinds is not None:
            pending = pending.where(col(Job.kind).in_(kinds))
        pending = pending.order_by(col(Job.request_id)).limit(limit)
        with reading(self._db) as session:
            if session.exec(pending.limit(1)).first() is None:
                return []  # the usual answer while idle: no write transaction for it
        with writing(self._db) as session:
            ids = session.exec(pending.with_for_update(skip_locked=True)).all()
            session.exec(update(Job).where(col(Job.request_id).in_(ids)).values(status="running", claimed_at=now()))
            claimed = session.exec(select(Job).where(col(Job.request_id).in_(ids)).order_by(col(Job.request_id)))
            return list(claimed.all())

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Write results and their rows durably, in one transaction; finished jobs keep their first outcome."""
        with writing(self._db) as session:
            for outcome in outcomes:
                values: dict[str, Any] = {"tokens_in": outcome.tokens_in} if outcome.tokens_in else {}
                values.update(result=outcome.result, result_type=outcome.result_type, tokens_out=outcome.tokens_out)
                finished = _finish(session, outcome.request_id, status="done", **values)
                if finished:
                    for row in outcome.rows:
                        session.merge(row)
        self._announce()

    def fail(self, request_id: int, error: str, category: Category, rows: Sequence[SQLModel] = ()) -> None:
        """Finish a job without a result; ``error`` is shown to the client."""
        with writing(self._db) as session:
            if _finish(session, request_id, status="failed", error=error, category=category):
                for row in rows:
                    session.merge(row)
        self._announce()

    def cancel(self, request_id: int) -> bool:
        """Fail a job that no engine has claimed yet; False if it is too late."""
        with writing(self._db) as session:
            done = _finish(
                session, request_id, ("pending",), status="failed", error="Cancelled by the client.", category="user"
            )
        self._announce()
        return done

    def requeue(self, base_model: str) -> int:
        """Put the running jobs of a dead engine back; how many there were."""
        with writing(self._db) as session:
            statement = update(Job).where(col(Job.status) == "running", col(Job.base_model) == base_model)
            count = _rows(session, statement.values(status="pending", claimed_at=None))
        self._announce()
        return count

    def finished_ids(self, request_ids: Collection[int]) -> set[int]:
        """Which of these are done or failed. Cheap: reads no payloads and no results."""
        found: set[int] = set()
        with reading(self._db) as session:
            for chunk in _chunks(request_ids):
                query = select(Job.request_id).where(
                    col(Job.request_id).in_(chunk), col(Job.status).in_(("done", "failed"))
                )
                found.update(cast(Iterable[int], session.exec(query).all()))
        return found

    def finished(self, request_ids: Collection[int]) -> dict[int, Job]:
        """Those of these jobs that are done or failed, with their results."""
        found: dict[int, Job] = {}
        with reading(self._db) as session:
            for chunk in _chunks(request_ids):
                query = select(Job).where(col(Job.request_id).in_(chunk), col(Job.status).in_(("done", "failed")))
                found.update({cast(int, job.request_id): job for job in session.exec(query).all()})
        return found

    def get(self, request_id: int) -> Job | None:
        """One job, whatever its status."""
        with reading(self._db) as session:
            return session.get(Job, request_id)

    def history(self, model_id: str) -> list[Job]:
        """The jobs of a model that went well, in seq order: what a recovery replays."""
        query = select(Job).where(Job.model_id == model_id, Job.status == "done")
        with reading(self._db) as session:
            return list(session.exec(query.order_by(col(Job.seq_id), col(Job.request_id))).all())

    def num_pending(self) -> int:
        """How many jobs are neither done nor failed."""
        with reading(self._db) as session:
            return session.exec(
                select(func.count()).select_from(Job).where(col(Job.status).in_(("pending", "running")))
            ).one()

    def prune(self, before: float) -> int:
        """Empty results of jobs finished before then, and payloads that no recovery needs; rows stay.

        A model is rebuilt from its newest training checkpoint with optimizer state, so payloads up to that
        checkpoint's seq are free to go; without one, all its payloads are needed.
        """
        finished = (col(Job.status).in_(("done", "failed")), col(Job.finished_at) < before)
        newest = (
            select(func.max(Checkpoint.seq_id))
            .where(Checkpoint.model_id == Job.model_id, Checkpoint.kind == "weights", col(Checkpoint.has_optimizer))
            .correlate(Job)
            .scalar_subquery()
        )
        needless = or_(col(Job.model_id).is_(None), col(Job.status) == "failed", col(Job.seq_id) <= newest)
        with writing(self._db) as session:
            results = _rows(session, update(Job).where(*finished, col(Job.result).is_not(None)).values(result=None))
            payloads = _rows(
                session, update(Job).where(*finished, col(Job.payload).is_not(None), needless).values(payload=None)
            )
        return results + payloads

    def _announce(self) -> None:
        if self._signal is not None:
            self._signal.announce()


def _append_one(session: DbSession, new: NewJob) -> Appended | InvalidInput:
    first = _first_row(session, new)
    if first is not None:
        if first.kind != new.kind:
            return InvalidInput("seq_id", new.seq_id, f"a new one: it is taken by a {first.kind} request")
        if first.fingerprint != new.fingerprint:
            return InvalidInput("seq_id", new.seq_id, f"a new one: it is taken by a different {first.kind} request")
        return Appended(cast(int, first.request_id), created=False)
    for row in new.rows:
        if isinstance(row, Sampler) and session.get(Sampler, row.sampler_id) is not None:
            return InvalidInput("sampling_session_seq_id", row.seq, "a number that this session has not used yet")
        session.merge(row)
    created = now()
    job = Job(
        kind=new.kind,
        session_id=new.session_id,
        base_model=new.base_model,
        model_id=new.model_id,
        sampler_id=new.sampler_id,
        seq_id=new.seq_id,
        payload=new.payload,
        payload_type=new.payload_type,
        payload_encoding=new.payload_encoding,
        fingerprint=new.fingerprint,
        tokens_in=new.tokens_in,
        created_at=created,
    )
    if new.error is not None:
        job.status, job.error, job.category, job.finished_at = "failed", new.error, "user", created
    session.add(job)
    session.flush()  # gives the row its id, and lets the next of this batch find it
    return Appended(cast(int, job.request_id), created=True)


def _first_row(session: DbSession, new: NewJob) -> Job | None:
    """The job that already has this seq, if any: a retry must not train twice."""
    if new.seq_id is None:
        return None
    if new.model_id is not None:
        return session.exec(select(Job).where(Job.model_id == new.model_id, Job.seq_id == new.seq_id)).first()
    if new.sampler_id is not None:
        return session.exec(select(Job).where(Job.sampler_id == new.sampler_id, Job.seq_id == new.seq_id)).first()
    return None


def _finish(
    session: DbSession, request_id: int, still: tuple[str, ...] = ("pending", "running"), **values: Any
) -> bool:
    statement = update(Job).where(col(Job.request_id) == request_id, col(Job.status).in_(still))
    return _rows(session, statement.values(finished_at=now(), **values)) == 1


def _rows(session: DbSession, statement: Any) -> int:
    return cast("CursorResult[Any]", session.exec(statement.execution_options(synchronize_session=False))).rowcount


def _chunks(ids: Collection[int]) -> Iterable[list[int]]:
    ordered = sorted(ids)
    for start in range(0, len(ordered), _IDS_PER_QUERY):
        yield ordered[start : start + _IDS_PER_QUERY]
