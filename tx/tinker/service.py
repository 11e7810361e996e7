"""What every router needs, in one object: the flags, the database's verbs, the two job threads, the engine's state.

Routers get it through ``Api``; tests build one around a database of their own. It knows HTTP only as far as FastAPI's
dependencies go.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from typing import Annotated, Any, Protocol

from fastapi import Depends, Query, Request
from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.engine import Engine as Database
from sqlmodel import col, select

from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, Engine, RecordedSequence, now, reading, writing
from tx.tinker.futures import Appender, Watcher
from tx.tinker.jobs import JobTable
from tx.tinker.metrics import Metrics
from tx.tinker.notify import ChangeSignal
from tx.tinker.sessions import Sessions
from tx.tinker.wire import responses
from tx.tinker.wire.requests import parse

log = logging.getLogger(__name__)

ALIVE_S = 15.0
"""An engine writes its heartbeat every second; one that was silent for longer is not counted on."""

KEEP_RESULTS_S = 24 * 3600.0
KEEP_RECORDINGS_S = 24 * 3600.0
"""Recorded sequences are usable for a day after their last use (protocol §3.6)."""


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
    """One API process."""

    def __init__(self, config: TxConfig, db: Database, engine_process: EngineProcess | None = None) -> None:
        self.config = config
        self.db = db
        self.engine_process = engine_process
        self._signals = [ChangeSignal(config.resolved_database_url) for _ in range(2)]
        self.jobs = JobTable(db, self._signals[0])
        self.sessions = Sessions(db)
        self.appender = Appender(self.jobs)
        self.watcher = Watcher(self.jobs, self._signals[1])
        self.metrics = Metrics()

    def close(self) -> None:
        """Stop the threads and let go of the database."""
        self.watcher.close()
        self.appender.close()
        for signal in self._signals:
            signal.close()
        self.db.dispose()

    def engines(self) -> list[Engine]:
        """Every engine that this database has seen, and lives or is this API's own."""
        with reading(self.db) as session:
            rows = session.exec(select(Engine).order_by(col(Engine.base_model))).all()
        own = None if self.config.external_engine else self.config.base_model_name
        return [row for row in rows if row.base_model == own or now() - row.heartbeat_at < ALIVE_S]

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
        if row.state in ("ready", "recovering") and now() - row.heartbeat_at > ALIVE_S:
            detail = f"no sign of life for {now() - row.heartbeat_at:.0f} s"
            return responses.Health(status="failed", engine=row.state, base_model=name, detail=detail)
        status = {"ready": "ok", "starting": "starting", "recovering": "recovering"}.get(row.state, "failed")
        return responses.Health.model_validate(
            {"status": status, "engine": row.state, "base_model": name, "detail": row.detail or None}
        )

    def sweep(self) -> None:
        """Housekeeping: what is past its time goes. Rows first: a folder without a row is only wasted space."""
        self.jobs.prune(now() - KEEP_RESULTS_S)
        with writing(self.db) as session:
            session.exec(delete(RecordedSequence).where(col(RecordedSequence.used_at) < now() - KEEP_RECORDINGS_S))
            expired = list(session.exec(select(Checkpoint).where(col(Checkpoint.expires_at) < now())).all())
            for checkpoint in expired:
                session.delete(checkpoint)
        for checkpoint in expired:
            self.remove_folder(checkpoint)

    def remove_folder(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint's files, once its row is gone."""
        log.info("Removing checkpoint %s", checkpoint.folder)
        shutil.rmtree(self.config.checkpoints_folder / checkpoint.folder, ignore_errors=True)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Api = Annotated[Service, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


def body[Body: BaseModel](model: type[Body]) -> Any:
    """Dependency: the JSON body as ``model``, whatever the content type says."""

    async def read(request: Request) -> Body:
        return parse(model, await request.body())

    return Depends(read)


def fingerprint(payload: bytes) -> str:
    """Short digest that tells a retry from another request with the same seq_id."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def payload_of(request: BaseModel) -> bytes:
    """A request as the job's payload: what the client said, without nulls."""
    return request.model_dump_json(exclude_none=True, exclude_unset=True).encode()
