"""The tables, and how to open the database that holds them. What may be done with a job is in ``tx.tinker.jobs``.

Times are UTC seconds since the epoch. Two processes share the database, so every write transaction on SQLite starts
with ``BEGIN IMMEDIATE``: a read that turns into a write can't be made to wait, it fails at once when another commits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    CursorResult,
    Index,
    LargeBinary,
    UniqueConstraint,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import URL, Connection, ExceptionContext, make_url
from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import ArgumentError, InterfaceError, InternalError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Field, SQLModel
from sqlmodel import Session as DbSession

from tx.errors import StartupError

_MIGRATION_LOCK = 0x7478_0001
"""Key of the PostgreSQL advisory lock under which one process at a time migrates."""

_BUSY_TIMEOUT_S = 30.0

LOCAL = "local"
"""The one user of a server without API keys."""

MAX_CONNECTIONS = 64
"""Of one process, in its pool."""

AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
"""What is raised while the database can't be reached or can't be written: nobody's request is to blame."""

UNFINISHED = ("pending", "running")
"""Values of ``Job.status`` that are not final."""

_IDS_PER_QUERY = 500
"""SQLite bounds the variables of one statement."""


class Session(SQLModel, table=True):
    """One client program: created once, kept alive by heartbeats, finished once."""

    session_id: str = Field(primary_key=True)
    created_at: float
    heartbeat_at: float
    finished_at: float | None = None
    finish_reason: str | None = None
    finish_detail: str | None = None
    tags: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    user_metadata: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    sdk_version: str = ""
    display_name: str | None = None
    project_id: str | None = None
    idempotency_key: str | None = Field(default=None, unique=True)
    owner: str = Field(default=LOCAL, index=True)
    """Name of the API key that it was created with (``tx.tinker.owners``)."""


class Model(SQLModel, table=True):
    """One tenant's adapter and optimizer state, created by a job; ``state`` is pending, ready or failed.

    Or ``copy``: no more than the owner of a copied checkpoint, which can't be trained on.
    """

    __table_args__ = (UniqueConstraint("session_id", "model_seq_id"),)

    model_id: str = Field(primary_key=True)
    session_id: str = Field(index=True)
    model_seq_id: int = Field(sa_type=BigInteger)
    base_model: str
    served_name: str
    rank: int
    seed: int = Field(sa_type=BigInteger)
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    optimizer: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    user_metadata: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    created_at: float
    last_request_at: float
    state: str = "pending"
    source_path: str | None = None


class Sampler(SQLModel, table=True):
    """A sampling session: the base model, a checkpoint path, or an ephemeral snapshot of a model.

    ``kind`` is base, path, snapshot or inflight.
    """

    __table_args__ = (UniqueConstraint("session_id", "seq"),)

    sampler_id: str = Field(primary_key=True)
    session_id: str = Field(index=True)
    seq: int = Field(sa_type=BigInteger)
    base_model: str
    served_name: str
    model_path: str | None = None
    snapshot_id: str | None = None
    kind: str
    created_at: float
    num_clones: int = 0
    """How many unpickled copies of the client have joined it."""


class Checkpoint(SQLModel, table=True):
    """A checkpoint that is complete in storage; ``kind`` is weights, sampler_weights or external_weights.

    Copies share ``folder`` with what they were copied from: the files go with the last row that names them.
    """

    __table_args__ = (UniqueConstraint("model_id", "kind", "name"),)

    id: int | None = Field(default=None, primary_key=True)
    model_id: str = Field(index=True)
    kind: str
    name: str
    folder: str
    size_bytes: int = Field(sa_type=BigInteger)
    created_at: float
    expires_at: float | None = None
    public: bool = False
    user_metadata: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    seq_id: int | None = Field(default=None, sa_type=BigInteger)
    has_optimizer: bool = False
    idempotency_key: str | None = Field(default=None, unique=True)
    """Of the request that made a copy."""


class Job(SQLModel, table=True):
    """One request. ``status`` is pending, running, done or failed; ``category`` of a failure is user or server."""

    __table_args__ = (
        UniqueConstraint("model_id", "seq_id"),
        UniqueConstraint("sampler_id", "seq_id"),
        # The queue is counted, and taken from, in this one alone.
        Index("ix_job_queue", "status", "base_model", "kind", "session_id", "request_id", "num_sequences"),
        Index("ix_job_sampler_id_finish_seq", "sampler_id", "finish_seq"),
        {"sqlite_autoincrement": True},  # an id is never given twice, even after rows were deleted
    )

    request_id: int | None = Field(default=None, primary_key=True)
    kind: str
    session_id: str | None = Field(default=None, index=True)
    base_model: str
    model_id: str | None = None
    sampler_id: str | None = None
    seq_id: int | None = Field(default=None, sa_type=BigInteger)
    status: str = "pending"
    payload: bytes | None = Field(default=None, sa_type=LargeBinary)
    payload_type: str = "application/json"
    payload_encoding: str | None = None
    fingerprint: str = ""
    """Tells a retry (same) from a reused seq_id (different)."""
    result: bytes | None = Field(default=None, sa_type=LargeBinary)
    result_type: str | None = None
    error: str | None = None
    category: str | None = None
    tokens_in: int = Field(default=0, sa_type=BigInteger)
    tokens_out: int = Field(default=0, sa_type=BigInteger)
    tokens_cached: int = Field(default=0, sa_type=BigInteger)
    """Of ``tokens_in``, those whose keys and values were there already."""
    created_at: float
    claimed_at: float | None = None
    finished_at: float | None = None
    num_sequences: int = 0
    """Of a sample: how many sequences it asks for."""
    started_at: float | None = None
    """Of a sample that runs for longer than an instant: when the worker got it."""
    finish_seq: int | None = Field(default=None, sa_type=BigInteger)
    """Order in which the jobs of one sampler finished: 1, 2, 3, …"""
    attempts: int = 0
    """How many engines died while their worker had it."""


class Cancellation(SQLModel, table=True):
    """A job that was cancelled while an engine had it, until that engine has let go of it."""

    request_id: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    base_model: str


class Engine(SQLModel, table=True):
    """One engine process per base model; ``state`` is starting, ready, recovering, stopped or failed."""

    base_model: str = Field(primary_key=True)
    served_names: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    state: str = "starting"
    detail: str = ""
    pid: int = 0
    max_context: int = 0
    vocab_size: int = 0
    tokenizer: str = ""
    decode_slots: int = 0
    started_at: float = 0.0
    heartbeat_at: float = 0.0


class RecordedSequence(SQLModel, table=True):
    """What the server itself sampled with ``record_stability_info``: little-endian int32 tokens, float32 logprobs."""

    sequence_id: str = Field(primary_key=True)
    session_id: str = Field(index=True)
    tokens: bytes = Field(sa_type=LargeBinary)
    logprobs: bytes = Field(sa_type=LargeBinary)
    prompt: bytes = Field(sa_type=LargeBinary)
    used_at: float


class AuditEntry(SQLModel, table=True):
    """Who changed what, for the audit log; ``category`` is what the log can be asked for (checkpoints, projects, …)."""

    id: int | None = Field(default=None, primary_key=True)
    at: float = Field(index=True)
    category: str
    event: str
    actor: str
    model_id: str | None = None
    tinker_path: str | None = None
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))


class TelemetryEvent(SQLModel, table=True):
    """What a client's SDK reported of itself, as it came."""

    id: int | None = Field(default=None, primary_key=True)
    session_id: str = Field(index=True)
    received_at: float
    severity: str
    event: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))


class RecoveryPoint(SQLModel, table=True):
    """A model's whole state after its job ``seq_id``, complete on the engine's disk (``tx.tinker.recovery_points``)."""

    model_id: str = Field(primary_key=True)
    seq_id: int = Field(primary_key=True, sa_type=BigInteger)
    base_model: str = Field(index=True)
    size_bytes: int = Field(sa_type=BigInteger)
    created_at: float


class Secret(SQLModel, table=True):
    """A key that every API process of this database shares, made when first needed."""

    name: str = Field(primary_key=True)
    value: bytes = Field(sa_type=LargeBinary)


def now() -> float:
    """UTC seconds since the epoch."""
    return time.time()


def open_database(url: str, max_connections: int = MAX_CONNECTIONS) -> Database:
    """Connect, create or migrate the tables to the newest revision, and hand back the pool of connections."""
    pool = {"pool_size": max_connections // 4, "max_overflow": max_connections - max_connections // 4}
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            db = _open_sqlite(url, pool)
        elif parsed.get_backend_name() == "postgresql":
            db = _open_postgresql(parsed, pool)
        else:
            raise StartupError(f"--database-url: {parsed.drivername} is neither sqlite nor postgresql.")
        with _migration_lock(db) as connection:
            _migrate(connection)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StartupError(f"--database-url can't be read: {str(error).splitlines()[0]}.") from error
    except (OperationalError, InternalError, sqlite3.OperationalError, OSError) as error:
        shown = make_url(url).render_as_string(hide_password=True)
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StartupError(f"The database {shown} can't be opened: {reason}.") from error
    return db


@contextlib.contextmanager
def reading(db: Database) -> Iterator[DbSession]:
    """A consistent view of the tables; nothing is committed. Rows stay usable after the block."""
    with DbSession(db, expire_on_commit=False) as session:
        yield session
        session.expunge_all()


@contextlib.contextmanager
def writing(db: Database) -> Iterator[DbSession]:
    """One write transaction, committed at the end of the block. Rows stay usable after it."""
    with _turn_to_write(db), DbSession(db.execution_options(tx_write=True), expire_on_commit=False) as session:
        yield session
        session.commit()


def num_changed(session: DbSession, statement: Any) -> int:
    """Execute an update or delete; how many rows it changed. Objects of the session don't notice."""
    done = session.exec(statement.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", done).rowcount


def chunks[Id: (int, str)](ids: Collection[Id]) -> Iterator[list[Id]]:
    """All of these in order, as many at a time as one statement may name."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), _IDS_PER_QUERY):
        yield ordered[start : start + _IDS_PER_QUERY]


@contextlib.contextmanager
def _turn_to_write(db: Database) -> Iterator[None]:
    """On SQLite, wait in the kernel's queue for our turn: SQLite's own waiting is sleeping and trying again.

    Against somebody who writes one transaction after another, that can go on for ten seconds.
    """
    descriptor = -1
    if db.dialect.name == "sqlite":
        with contextlib.suppress(OSError):  # a file system without locks: then as SQLite does it
            descriptor = os.open(f"{db.url.database}-turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)  # which also gives the lock back


def _open_sqlite(url: str, pool: dict[str, int]) -> Database:
    database = make_url(url).database
    if not database or database == ":memory:":
        raise StartupError("--database-url: an in-memory SQLite can't be shared by two processes; name a file.")
    Path(database).parent.mkdir(parents=True, exist_ok=True)
    db = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False}, **pool)

    @event.listens_for(db, "connect")
    def set_up(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        # FULL: a future's answer is durable before the client sees it.
        connection.execute("PRAGMA synchronous=FULL").close()

    @event.listens_for(db, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("tx_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    # The file remembers its journal's mode. Changing it doesn't wait for others, it fails: so one process at a time.
    with _turn_to_write(db), contextlib.closing(sqlite3.connect(database, timeout=_BUSY_TIMEOUT_S)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    return db


def _open_postgresql(url: URL, pool: dict[str, int]) -> Database:
    db = create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **pool)

    @event.listens_for(db, "handle_error")
    def forget_read_only(context: ExceptionContext) -> None:
        # After a failover, or once the disk has room again, only a new connection may find who can write.
        if isinstance(context.original_exception, ReadOnlySqlTransaction):
            context.is_disconnect = True

    return db


@contextlib.contextmanager
def _migration_lock(db: Database) -> Iterator[Connection]:
    """One write transaction that excludes every other process's migration: API and engine start together."""
    with db.execution_options(tx_write=True).connect() as connection, connection.begin():
        if db.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        yield connection


def _migrate(connection: Connection) -> None:
    # Imported here: two thirds of the time that importing this module would otherwise take.
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    head = ScriptDirectory.from_config(config).get_current_head()
    if MigrationContext.configure(connection).get_current_revision() != head:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    # On a file that may only be read, BEGIN IMMEDIATE succeeds; so write something.
    connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
