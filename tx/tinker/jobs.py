"""The log of jobs: append, claim, start, commit, fail, requeue, cancel. Every verb that changes a job's status is here.

::

    append ─▶ pending ─claim─▶ running ─commit─▶ done
                 │  ▲             │
                 │  └──requeue────┤                    (a crash put it back)
                 └──fail, cancel──┴─fail, cancel──▶ failed

done and failed are final: an outcome that arrives for a finished job is dropped. Samples can be cancelled until they
are done; all other jobs only until they are claimed, because what they change is their model's history. A cancelled
job that an engine had is also listed in ``Cancellation``, from where that engine takes it. The unique keys of
``tx.tinker.db`` make a retried request find its first row. No HTTP, no scheduling, no decoding of payloads.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from sqlalchemy import and_, bindparam, case, delete, func, insert, or_, text, update
from sqlalchemy import select as select_columns
from sqlalchemy.engine import Connection
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased
from sqlmodel import Session as DbSession
from sqlmodel import SQLModel, col, select

from tx.errors import InvalidInput, Overloaded
from tx.tinker import pending
from tx.tinker.admission import Admission, Ask, Share, unfinished_sequences
from tx.tinker.db import (
    UNFINISHED,
    Cancellation,
    Job,
    Model,
    Sampler,
    Session,
    chunks,
    now,
    num_changed,
    reading,
    writing,
)
from tx.tinker.notify import ChangeSignal, Topic

JOB_KINDS = (
    "create_model",
    "load_weights",
    "unload_model",
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "sample",
)
"""Every value of ``Job.kind``. create_model and create-via-load (load_weights) are seq 0 of their model."""

Category = Literal["user", "server"]

CANCELLED = "Cancelled by the client."

_FINISH_LOCK = 0x7478_0002
"""Key of the PostgreSQL advisory lock under which jobs finish, so that ``finish_seq`` is the order of the commits."""


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
    num_sequences: int = 0
    rows: tuple[SQLModel, ...] = ()
    error: str | None = None
    share: Share | None = None

    @property
    def ask(self) -> Ask:
        """The room that it needs."""
        return Ask(self.base_model, self.num_sequences, self.share)


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
    tokens_cached: int = 0
    rows: Sequence[SQLModel] = field(default=())


@dataclass(frozen=True)
class Completion:
    """A job of a sampler that is over, in a list of them; ``finish_seq`` tells where the list goes on."""

    request_id: int
    seq_id: int | None
    finish_seq: int
    failed: bool
    num_bytes: int | None


class JobTable:
    """The verbs. Any thread may call them; each call is one transaction.

    Args:
        max_queued_samples: unfinished sequences of one base model past which samples are refused (None: never).
        owner: whose jobs ``get``, ``answer`` and ``is_over`` find (None: everybody's).
    """

    def __init__(
        self,
        db: Database,
        signal: ChangeSignal | None = None,
        *,
        max_queued_samples: int | None = None,
        owner: str | None = None,
    ) -> None:
        self._db = db
        self._signal = signal
        self._admission = Admission(db, max_queued_samples)
        self._appending = threading.Lock()
        self._owner = owner

    def append(self, jobs: Sequence[NewJob]) -> list[Appended | InvalidInput | Overloaded]:
        """Append all of them in one transaction; each one's outcome, in order. A bad one doesn't stop the others."""
        for attempt in range(5):
            try:
                with self._appending:
                    self._admission.expect(job.ask for job in jobs)
                    with writing(self._db) as session:
                        answers = [_append_one(session, job, self._admission) for job in jobs]
                break
            except IntegrityError:
                # Another API process appended the same request between our look and our insert: look again.
                if attempt == 4:
                    raise
        born_failed = any(job.error is not None for job in jobs)
        self._announce("appended", *(("finished",) if born_failed else ()))
        return answers

    def claim(
        self, base_model: str, limit: int, kinds: Collection[str] = JOB_KINDS, *, in_turn: bool = False
    ) -> list[Job]:
        """The oldest pending jobs of one base model, now running; they come in order of request_id.

        ``in_turn``: the oldest of each session, then the second of each, and so on.
        """
        choose = pending.in_turn if in_turn else pending.oldest
        with reading(self._db) as session:
            if not pending.any_pending(session.connection(), base_model, kinds):
                return []  # the usual answer while idle
            # Nobody else claims, so what is pending now can only have been cancelled when it is our turn to write.
            ids = choose(session.connection(), base_model, kinds, limit)
        with writing(self._db) as session:
            claimed = session.connection().execute(_CLAIM, {"ids": ids, "time": now()})
            return sorted((Job(**row) for row in claimed.mappings()), key=lambda job: cast(int, job.request_id))

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Write results and their rows durably, in one transaction; finished jobs keep their first outcome."""
        with writing(self._db) as session:
            _take_turns(session)
            for outcome in outcomes:
                values: dict[str, Any] = {"tokens_in": outcome.tokens_in} if outcome.tokens_in else {}
                values.update(result=outcome.result, result_type=outcome.result_type)
                values.update(tokens_out=outcome.tokens_out, tokens_cached=outcome.tokens_cached)
                finished = _finish(session, outcome.request_id, status="done", **values)
                if finished:
                    for row in outcome.rows:
                        session.merge(row)
        self._announce("finished")

    def fail(self, request_id: int, error: str, category: Category, rows: Sequence[SQLModel] = ()) -> None:
        """Finish a job without a result; ``error`` is shown to the client."""
        with writing(self._db) as session:
            _take_turns(session)
            if _finish(session, request_id, status="failed", error=error, category=category):
                for row in rows:
                    session.merge(row)
        self._announce("finished")

    def cancel(self, *request_ids: int, error: str = CANCELLED) -> int:
        """Fail those that can still be cancelled (see the module's docstring); how many that were."""
        count = 0
        for chunk in chunks(request_ids):
            with writing(self._db) as session:
                _take_turns(session)
                count += sum(_cancel(session, request_id, error) for request_id in chunk)
            self._announce("appended", "finished")  # the engine lets go of what it has
        return count

    def take_cancelled(self, base_model: str) -> list[int]:
        """The jobs that were cancelled while the engine of this base model had them; each is handed out once."""
        with reading(self._db) as session:
            ids = list(session.connection().execute(_CANCELLED, {"base_model": base_model}).scalars())
        for chunk in chunks(ids):
            with writing(self._db) as session:
                session.exec(delete(Cancellation).where(col(Cancellation.request_id).in_(chunk)))
        return ids

    def start(self, request_ids: Collection[int]) -> None:
        """Note that the worker has these, so that their clients needn't be told that they wait."""
        for chunk in chunks(request_ids):
            with writing(self._db) as session:
                running = update(Job).where(col(Job.request_id).in_(chunk), col(Job.status) == "running")
                session.exec(running.values(started_at=now()))

    def requeue(self, base_model: str, suspects: Collection[int] = ()) -> int:
        """Put the running jobs of a dead engine back; how many there were. ``suspects`` were there when it died."""
        with writing(self._db) as session:
            for chunk in chunks(suspects):
                there = update(Job).where(col(Job.request_id).in_(chunk), col(Job.status) == "running")
                session.exec(there.values(attempts=col(Job.attempts) + 1))
            statement = update(Job).where(col(Job.status) == "running", col(Job.base_model) == base_model)
            count = num_changed(session, statement.values(status="pending", claimed_at=None, started_at=None))
        self._announce("appended")
        return count

    def finished_ids(self, request_ids: Collection[int]) -> set[int]:
        """Which of these are done or failed. Cheap: reads no payloads and no results."""
        found: set[int] = set()
        with reading(self._db) as session:
            for chunk in chunks(request_ids):
                found.update(session.connection().execute(_FINISHED, {"ids": chunk}).scalars())
        return found

    def answer(self, request_id: int) -> Any:
        """What a client is told of a job: a row with the columns ``ANSWERED``; None if there is no such job."""
        with self._db.connect() as connection:
            return self._one(connection, _ANSWER, request_id).first()

    def is_over(self, request_id: int) -> bool:
        """Whether nobody need wait for this one: it is done, failed, or was never there. Cheap as ``finished_ids``."""
        with self._db.connect() as connection:
            status = self._one(connection, _STATUS, request_id).scalar()
        return status not in UNFINISHED

    def get(self, request_id: int) -> Job | None:
        """One job, whatever its status."""
        with reading(self._db) as session:
            return cast("Job | None", self._one(session, _WHOLE, request_id).scalars().first())

    def _one(self, connection: Connection | DbSession, queries: tuple[Any, Any], request_id: int) -> Any:
        """What the query for everybody finds, or the one for an owner."""
        of_all, of_owner = queries
        if self._owner is None:
            return connection.execute(of_all, {"id": request_id})
        return connection.execute(of_owner, {"id": request_id, "owner": self._owner})

    def completions(self, sampler_id: str, after: int, limit: int = 1000) -> list[Completion]:
        """Which jobs of a sampler finished after that ``finish_seq``, in order; reads no payloads and no results."""
        failed, num_bytes = col(Job.status) == "failed", func.length(col(Job.result))
        query = (
            select_columns(col(Job.request_id), col(Job.seq_id), col(Job.finish_seq), failed, num_bytes)
            .where(col(Job.sampler_id) == sampler_id, col(Job.finish_seq) > after)
            .order_by(col(Job.finish_seq))
            .limit(limit)
        )
        with reading(self._db) as session:
            return [Completion(*row) for row in session.connection().execute(query)]

    def last_finished(self, sampler_ids: Collection[str]) -> dict[str, int]:
        """By sampler, the highest ``finish_seq`` so far (0: none). One look into the index for each."""
        last = select(func.max(Job.finish_seq)).where(col(Job.sampler_id) == col(Sampler.sampler_id)).correlate(Sampler)
        found: dict[str, int] = {}
        with reading(self._db) as session:
            for chunk in chunks(sampler_ids):
                query = select(Sampler.sampler_id, last.scalar_subquery()).where(col(Sampler.sampler_id).in_(chunk))
                found.update({sampler_id: seq or 0 for sampler_id, seq in session.exec(query).all()})
        return found

    def unfinished_sequences(self, base_model: str) -> int:
        """How many sequences of this base model wait or decode. Reads one index."""
        with reading(self._db) as session:
            return unfinished_sequences(session, base_model)

    def unfinished_samples(self, session_id: str) -> list[int]:
        """The samples of a session that are neither done nor failed."""
        query = select(Job.request_id).where(
            Job.kind == "sample", Job.session_id == session_id, col(Job.status).in_(UNFINISHED)
        )
        with reading(self._db) as session:
            return cast(list[int], list(session.exec(query).all()))

    def abandoned_samples(self, before: float) -> list[int]:
        """Unfinished samples whose session has ended, or has given no sign of life (a heartbeat, they) since then."""
        silent = and_(col(Session.heartbeat_at) < before, col(Job.created_at) < before)
        query = (
            select(Job.request_id)
            .join(Session, col(Session.session_id) == col(Job.session_id))
            .where(
                Job.kind == "sample",
                col(Job.status).in_(UNFINISHED),
                or_(col(Session.finished_at).is_not(None), silent),
            )
            .order_by(col(Job.request_id))
        )
        with reading(self._db) as session:
            return cast(list[int], list(session.exec(query).all()))

    def history(self, model_id: str) -> list[Job]:
        """The jobs of a model that went well, in seq order: what a recovery replays."""
        query = select(Job).where(Job.model_id == model_id, Job.status == "done")
        with reading(self._db) as session:
            return list(session.exec(query.order_by(col(Job.seq_id), col(Job.request_id))).all())

    def num_pending(self) -> int:
        """How many jobs are neither done nor failed."""
        with reading(self._db) as session:
            return session.exec(select(func.count()).select_from(Job).where(col(Job.status).in_(UNFINISHED))).one()

    def _announce(self, *topics: Topic) -> None:
        if self._signal is not None:
            self._signal.announce(*topics)


# ---- statements -----------------------------------------------------------------------------------------------------
# The hot ones, made once: putting one together takes SQLAlchemy longer than the database takes to run it. They run on
# the session's connection, past the ORM, for the same reason.

_JOB = SQLModel.metadata.tables[str(Job.__tablename__)].c
_IDS = _JOB.request_id.in_(bindparam("ids", expanding=True))

_COPIED = (
    "kind", "session_id", "base_model", "model_id", "sampler_id", "seq_id", "payload", "payload_type",
    "payload_encoding", "fingerprint", "tokens_in", "num_sequences",
)  # fmt: skip
"""Columns that a new job's row takes from ``NewJob``."""

_INSERT = insert(_JOB.request_id.table)

_FIRST = select_columns(_JOB.request_id, _JOB.kind, _JOB.fingerprint).where(_JOB.seq_id == bindparam("seq_id"))
_FIRST_OF_MODEL = _FIRST.where(_JOB.model_id == bindparam("owner"))
_FIRST_OF_SAMPLER = _FIRST.where(_JOB.sampler_id == bindparam("owner"))

_CLAIM = update(_JOB.request_id.table).where(_IDS, _JOB.status == "pending")
_CLAIM = _CLAIM.values(status="running", claimed_at=bindparam("time")).returning(_JOB.request_id.table)

_FINISHED = select_columns(_JOB.request_id).where(_IDS, _JOB.status.in_(("done", "failed")))

ANSWERED = (
    "request_id", "kind", "base_model", "status", "result", "result_type", "error", "category", "started_at",
)  # fmt: skip


def _one_job(*columns: Any) -> tuple[Any, Any]:
    """The query for everybody, and the one that finds an owner's alone."""
    of_all = select_columns(*columns).where(_JOB.request_id == bindparam("id"))
    of_owner = of_all.join(Session, col(Session.session_id) == _JOB.session_id)
    return of_all, of_owner.where(col(Session.owner) == bindparam("owner"))


_ANSWER = _one_job(*(_JOB[name] for name in ANSWERED))
_STATUS = _one_job(_JOB.status)
_WHOLE = _one_job(Job)

_CANCELLED = select_columns(col(Cancellation.request_id)).where(col(Cancellation.base_model) == bindparam("base_model"))


def _finish_statement() -> Any:
    other = aliased(Job)
    following = select_columns(func.coalesce(func.max(col(other.finish_seq)), 0) + 1).where(
        col(other.sampler_id) == _JOB.sampler_id
    )
    finish_seq = case((_JOB.sampler_id.is_not(None), following.correlate(_JOB.request_id.table).scalar_subquery()))
    still = _JOB.status.in_(bindparam("still", expanding=True))
    return update(_JOB.request_id.table).where(_JOB.request_id == bindparam("id"), still).values(finish_seq=finish_seq)


_FINISH = _finish_statement()
"""Sets also the columns that it is given values of."""


def _append_one(session: DbSession, new: NewJob, admission: Admission) -> Appended | InvalidInput | Overloaded:
    first = _first_row(session, new)
    if first is not None:
        if first.kind != new.kind:
            return InvalidInput("seq_id", new.seq_id, f"a new one: it is taken by a {first.kind} request")
        if first.fingerprint != new.fingerprint:
            return InvalidInput("seq_id", new.seq_id, f"a new one: it is taken by a different {first.kind} request")
        return Appended(cast(int, first.request_id), created=False)
    refusal = admission.admit(new.ask)
    if refusal is not None:
        return refusal
    for row in new.rows:
        if isinstance(row, Sampler) and session.get(Sampler, row.sampler_id) is not None:
            return InvalidInput("sampling_session_seq_id", row.seq, "a number that this session has not used yet")
        if isinstance(row, Model):
            first_model = session.get(Model, row.model_id)
            if first_model is not None and first_model.state == "copy":  # one that no job has made
                return InvalidInput("model_seq_id", row.model_seq_id, "a number that this session has not used yet")
        session.merge(row)
    created = now()
    values: dict[str, Any] = {name: getattr(new, name) for name in _COPIED}
    values.update(status="pending", created_at=created, tokens_out=0)
    if new.error is not None:
        values.update(status="failed", error=new.error, category="user", finished_at=created)
    # At once: it gives the row its id, and lets the next of this batch find it.
    inserted = session.connection().execute(_INSERT, values).inserted_primary_key
    assert inserted is not None  # of a single row there is one
    return Appended(cast(int, inserted[0]), created=True)


def _first_row(session: DbSession, new: NewJob) -> Any:
    """(request_id, kind, fingerprint) of the job that already has this seq, if any: a retry must not train twice."""
    if new.seq_id is None:
        return None
    for query, owner in ((_FIRST_OF_MODEL, new.model_id), (_FIRST_OF_SAMPLER, new.sampler_id)):
        if owner is not None:
            return session.connection().execute(query, {"owner": owner, "seq_id": new.seq_id}).first()
    return None


def _take_turns(session: DbSession) -> None:
    """First in every transaction that finishes jobs: SQLite has one writer at a time, PostgreSQL needs to be told."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _FINISH_LOCK})


def _finish(session: DbSession, request_id: int, still: tuple[str, ...] = UNFINISHED, **values: Any) -> bool:
    given = {"id": request_id, "still": still, "finished_at": now(), **values}
    return session.connection().execute(_FINISH, given).rowcount == 1


def _cancel(session: DbSession, request_id: int, error: str) -> bool:
    # Locked, so that no engine claims it between this look and the update.
    query = select(Job.kind, Job.status, Job.base_model).where(Job.request_id == request_id).with_for_update()
    found = session.exec(query).first()
    if found is None:
        return False
    kind, status, base_model = found
    still = UNFINISHED if kind == "sample" else ("pending",)
    if not _finish(session, request_id, still, status="failed", error=error, category="user"):
        return False
    if status == "running":
        session.merge(Cancellation(request_id=request_id, base_model=base_model))
    return True
