"""What every router needs, in one object: the flags, the database's verbs, the two job threads, the engine's state.

Routers get it through ``Api``, bound to the caller: its verbs find only what is his. Tests build one around a database
of their own. It knows HTTP only as far as FastAPI's dependencies go.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Header, Path, Query, Request
from pydantic import BaseModel
from sqlalchemy.engine import Engine as Database
from sqlmodel import col, select

from tx.errors import StorageError
from tx.tinker import pruning, recordings, uptime
from tx.tinker.auth import ANYBODY, Auth, Caller
from tx.tinker.checkpoint_rows import CheckpointRows
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, Engine, now, reading
from tx.tinker.futures import Appender, Heartbeats, Watcher
from tx.tinker.jobs import JobTable
from tx.tinker.metrics import Metrics
from tx.tinker.notify import ChangeSignal
from tx.tinker.openapi import describes_body
from tx.tinker.sessions import EXPIRED_AFTER_S, Sessions
from tx.tinker.signing import UrlSigner
from tx.tinker.uptime import Uptime
from tx.tinker.wire import responses
from tx.tinker.wire.requests import parse

log = logging.getLogger(__name__)

ALIVE_S = 15.0
"""An engine writes its heartbeat every second; one that was silent for longer is not counted on."""

_COUNT_EVERY_S = 1.0

HOLD_S = 25.0
"""Clients cut a silent poll at 45 s and ask again at once after a 408 (protocol §2.5)."""
_TURNS = 8
"""Requests that are worked on at the same time, of those that come by the thousand. More would only delay heartbeats,
and whatever else is on the event loop: one process has one core."""

KEEP_RESULTS_S = 24 * 3600.0
"""Of uptime: an answer that nobody can come for doesn't grow old."""


class EngineProcess(Protocol):
    """What the service asks of whoever runs the engine process."""

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""

    @property
    def restarts(self) -> int:
        """How often it had to be started again."""

    @property
    def failure(self) -> str | None:
        """Why there is none and will be none, if so."""


class Service:
    """One API process.

    ``caller``: whom its verbs work for; until ``bound_to`` somebody, that is the server itself, to whom all belongs.

    Args:
        clock: UTC seconds since the epoch.
        steady: seconds that never leap, to judge ages by.
        hold_s: how long a poll is held while there is nothing to answer.
    """

    def __init__(
        self,
        config: TxConfig,
        db: Database,
        engine_process: EngineProcess | None = None,
        *,
        clock: Callable[[], float] = now,
        steady: Callable[[], float] = time.monotonic,
        hold_s: float = HOLD_S,
    ) -> None:
        self.config = config
        self.db = db
        self.engine_process = engine_process
        self._signals = [ChangeSignal(config.resolved_database_url, hears) for hears in ((), ("finished",))]
        self.clock = clock
        self.caller = ANYBODY
        self.auth = Auth(config.api_keys_file, db)
        self.hold_s = hold_s
        self.steady = steady
        self._lived = Uptime(clock=clock, steady=steady)
        self._counts: dict[str, tuple[float, int]] = {}  # by base model: when counted, unfinished sequences
        self._count_lock = threading.Lock()
        self.jobs = JobTable(db, self._signals[0], max_queued_samples=config.max_queued_samples)
        self.sessions = Sessions(db, clock)
        self.checkpoints = CheckpointRows(db, clock)
        self.folders = CheckpointFolders(config.checkpoints_folder)
        self.signer = UrlSigner(db)
        self.appender = Appender(self.jobs)
        self.heartbeats = Heartbeats(self.sessions)
        self.watcher = Watcher(self.jobs, self._signals[1])
        self.metrics = Metrics()
        self.turns = asyncio.Semaphore(_TURNS)

    @contextlib.asynccontextmanager
    async def out_of_turn(self) -> AsyncIterator[None]:
        """For a request that has its turn and nothing to do now: let others have it meanwhile."""
        self.turns.release()
        try:
            yield
        finally:
            await self.turns.acquire()

    def close(self) -> None:
        """Stop the threads and let go of the database."""
        self.watcher.close()
        self.appender.close()
        self.heartbeats.close()
        for signal in self._signals:
            signal.close()
        self.db.dispose()

    def bound_to(self, caller: Caller) -> Service:
        """This service for one caller: to him, what belongs to others does not exist (``tx.tinker.owners``).

        Every router gets its service from here, so that a route can only forget to ask for more.
        """
        owner = caller.owner
        if owner is None:
            return self
        bound = copy.copy(self)  # it shares everything but what follows
        bound.caller = caller
        bound.jobs = JobTable(self.db, self._signals[0], max_queued_samples=self.config.max_queued_samples, owner=owner)
        bound.sessions = Sessions(self.db, self.clock, owner)
        bound.checkpoints = CheckpointRows(self.db, self.clock, owner)
        return bound

    def engines(self) -> list[Engine]:
        """Every engine that this database has seen, and lives or is this API's own."""
        with reading(self.db) as session:
            rows = session.exec(select(Engine).order_by(col(Engine.base_model))).all()
        own = None if self.config.external_engine else self.config.base_model_name
        return [row for row in rows if row.base_model == own or self._silent_s(row) is None]

    def engine(self, base_model: str) -> Engine | None:
        """The engine of a base model, alive or not."""
        with reading(self.db) as session:
            return session.get(Engine, base_model)

    def served_models(self) -> dict[str, Engine | None]:
        """Every name under which a base model is served now, with its engine once that has registered."""
        names: dict[str, Engine | None] = {}
        if not self.config.external_engine or self.config.base_model is not None:
            names.update(dict.fromkeys(self.config.served_names))
        for engine in self.engines():
            own = engine.base_model == self.config.base_model_name
            for name in (engine.base_model, *engine.served_names, *(self.config.served_names if own else ())):
                names[name] = engine
        return names

    def canonical(self, name: str) -> str | None:
        """The canonical name of the base model that is served as ``name``; None if none is."""
        names = self.served_models()
        if name not in names:
            return None
        engine = names[name]
        return engine.base_model if engine is not None else self.config.base_model_name

    def health(self) -> responses.Health:
        """The truth about the engine of this API's base model."""
        name = self.config.base_model_name
        row, process = self.engine(name), self.engine_process
        if process is not None and process.failure is not None:
            return responses.Health(status="failed", engine="failed", base_model=name, detail=process.failure)
        is_current = row is not None and (process is None or row.pid == process.pid)
        if row is None or not is_current:
            again = process is not None and process.restarts > 0
            state = "recovering" if again else "starting"
            return responses.Health(status=state, engine=state, base_model=name)
        silent_s = self._silent_s(row)
        if row.state in ("ready", "recovering") and silent_s is not None:
            detail = f"no sign of life for {silent_s:.0f} s"
            return responses.Health(status="failed", engine=row.state, base_model=name, detail=detail)
        status = {"ready": "ok", "starting": "starting", "recovering": "recovering"}.get(row.state, "failed")
        return responses.Health.model_validate(
            {"status": status, "engine": row.state, "base_model": name, "detail": row.detail or None}
        )

    def queue_state(self, job: Any) -> tuple[responses.QueueState, str | None]:
        """Whether a job (``JobTable.answer``) that is not finished can go on, and if not, why."""
        engine = self.engine(job.base_model)
        if engine is None:
            return "paused_capacity", f"The engine of {job.base_model} has not started yet."
        if engine.state != "ready":
            detail = f": {engine.detail}" if engine.detail else ""
            return "paused_capacity", f"The engine of {job.base_model} is {engine.state}{detail}."
        silent_s = self._silent_s(engine)
        if silent_s is not None:
            return "paused_capacity", f"The engine of {job.base_model} has been silent for {silent_s:.0f} s."
        waiting = self.num_sequences(job.base_model) - engine.decode_slots
        if job.kind != "sample" or job.started_at is not None or waiting <= 0:
            return "active", None
        wait = "sequence waits" if waiting == 1 else "sequences wait"
        return "paused_capacity", f"{waiting} {wait} for {engine.decode_slots} decode slots."

    def _silent_s(self, engine: Engine) -> float | None:
        """None for an engine that lives; else for how long it has been silent, at least."""
        first, last = self._lived.span(ALIVE_S)
        if first <= engine.heartbeat_at <= last + ALIVE_S:  # its host's clock need not be ours
            return None
        return max(ALIVE_S, first + ALIVE_S - engine.heartbeat_at)

    def num_sequences(self, base_model: str) -> int:
        """How many sequences wait or decode, as of at most a second ago: every poll asks."""
        with self._count_lock:
            counted_at, count = self._counts.get(base_model, (float("-inf"), 0))
            if time.monotonic() - counted_at > _COUNT_EVERY_S:
                count = self.jobs.unfinished_sequences(base_model)
                self._counts[base_model] = time.monotonic(), count
            return count

    def cancel_abandoned(self) -> int:
        """Cancel the samples that nobody waits for any more: their session has ended, or its heartbeats have.

        Models and training are left alone: a client may come back to them.
        """
        count = self.jobs.cancel(
            *self.jobs.abandoned_samples(self.silent_before()), error="Cancelled: its session is over."
        )
        if count:
            log.info("Cancelled %d samples of sessions that have ended or fallen silent", count)
        return count

    def active_since(self) -> float:
        """An open session with a heartbeat since then is active."""
        return self._lived.before(EXPIRED_AFTER_S)

    def silent_before(self) -> float:
        """An open session without a heartbeat since then has fallen silent; 0 while we can't tell.

        While we were down, no heartbeat could reach us.
        """
        return self.active_since() if self._lived.seconds() >= EXPIRED_AFTER_S else 0.0

    @cached_property
    def _ages(self) -> Uptime:
        """Of what is deleted for its age. Made by the one process that keeps house: the file is for one."""
        file = self.config.data_folder / "uptime-api"
        return Uptime(file, settle_s=uptime.SETTLE_S, clock=self.clock, steady=self.steady)

    def sweep(self) -> None:
        """Housekeeping: what is past its time goes. Rows first: a folder without a row is only wasted space."""
        pruning.prune(self.db, self._ages.before(KEEP_RESULTS_S))
        recordings.prune(self.db, self._ages.before(recordings.KEPT_S))
        for checkpoint in self.checkpoints.expire():
            self.remove_folder(checkpoint)

    def remove_folder(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint's files, once its row is gone."""
        log.info("Removing checkpoint %s", checkpoint.folder)
        try:
            self.folders.delete(checkpoint.folder)
        except StorageError as error:
            log.warning("Checkpoint %s is gone, but its files remain: %s", checkpoint.folder, error)


async def service_of(request: Request) -> Service:
    """Dependency: the service that the application serves, bound to the caller whom the gate has found."""
    # Not a plain function: FastAPI would send each request through the thread pool for it.
    service: Service = request.app.state.service
    return service.bound_to(request.state.caller)


Api = Annotated[Service, Depends(service_of)]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries in the reply.")]
Offset = Annotated[int, Query(ge=0, le=2**31, description="Entries to skip.")]
AccessScope = Annotated[
    Literal["owned", "accessible"],
    Query(description="What the caller owns, or may see: that is the runs with a published checkpoint, too."),
]
SessionId = Annotated[str, Path(description="As `create_session` gave it.")]
ModelId = Annotated[str, Path(description="`<session_id>:train:<model_seq_id>`; a model is a training run.")]
SamplerId = Annotated[str, Path(description="`<session_id>:sample:<sampling_session_seq_id>`.")]
CheckpointId = Annotated[str, Path(description="`<weights|sampler_weights|external_weights>/<name>`, slash and all.")]
CheckpointKind = Annotated[str, Path(description="`weights`, `sampler_weights` or `external_weights`.")]
CheckpointName = Annotated[str, Path(description="What the checkpoint was saved as.")]
Expires = Annotated[str, Query(description="Of the signed URL: seconds since the epoch.")]
Signature = Annotated[str, Query(description="Of the signed URL.")]
IdempotencyKey = Annotated[
    str | None, Header(max_length=300, description="The same for each retry of a request: it is carried out once.")
]


def body[Body: BaseModel](model: type[Body]) -> Any:
    """Dependency: the JSON body as ``model``, whatever the content type says."""

    @describes_body(model)
    async def read(request: Request) -> Body:
        return parse(model, await request.body())

    return Depends(read)


def fingerprint(payload: bytes) -> str:
    """Short digest that tells a retry from another request with the same seq_id."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def payload_of(request: BaseModel) -> bytes:
    """A request as the job's payload: what the client said, without nulls."""
    return request.model_dump_json(exclude_none=True, exclude_unset=True).encode()
