"""The engine's row in the database: what it serves, and every second that it lives. The API tells clients from it."""

from __future__ import annotations

import logging
import os
import threading
import time

from sqlalchemy.engine import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from tx.errors import StartupError
from tx.tinker import db as tables
from tx.tinker.db import now, reading, writing
from tx.types import ModelCard

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
DEAD_AFTER_S = 5.0
"""An engine that has been silent for so long is taken for dead."""


class Registration:
    """Keeps one row true until ``close``."""

    def __init__(self, database: Database, base_model: str, served_names: tuple[str, ...], tokenizer: str = "") -> None:
        self._db = database
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._row = tables.Engine(
            base_model=base_model,
            served_names=list(served_names),
            detail="starting",
            pid=os.getpid(),
            tokenizer=tokenizer,
            started_at=now(),
        )
        self._await_predecessor()
        self.update("starting", "reading the base model")
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def update(
        self,
        state: str,
        detail: str = "",
        card: ModelCard | None = None,
        tokenizer: str | None = None,
        decode_slots: int | None = None,
    ) -> None:
        """Change what the row says, durably."""
        with self._lock:
            self._row.state, self._row.detail = state, detail
            if card is not None:
                self._row.max_context, self._row.vocab_size = card.max_context, card.vocab_size
            if tokenizer is not None:
                self._row.tokenizer = tokenizer
            if decode_slots is not None:
                self._row.decode_slots = decode_slots
            self._write()

    def close(self, state: str = "stopped", detail: str = "") -> None:
        """Stop the heartbeat with a last word."""
        self._closed.set()
        self._thread.join()
        self.update(state, detail)

    def _write(self) -> None:
        self._row.heartbeat_at = now()
        with writing(self._db) as session:
            session.merge(self._row)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                with self._lock:
                    self._write()
            except SQLAlchemyError as error:  # the database may come back; a missed beat only makes us look dead
                log.warning("the heartbeat could not be written: %s", str(error).splitlines()[0])

    def _await_predecessor(self) -> None:
        """Two engines of one base model would take each other's jobs: wait for a dying one, refuse a living one."""
        began = changed = time.monotonic()
        other = self._other_that_may_live()
        while other is not None:
            time.sleep(0.1)
            last, other, at = other.heartbeat_at, self._other_that_may_live(), time.monotonic()
            if other is not None and other.heartbeat_at != last:
                changed = at
            if at - changed > DEAD_AFTER_S:
                return  # whatever the wall clock says: a living one would have written
            if at - began > 2 * DEAD_AFTER_S:
                raise StartupError(f"Another engine already serves {self._row.base_model} on this database.")

    def _other_that_may_live(self) -> tables.Engine | None:
        with reading(self._db) as session:
            row = session.get(tables.Engine, self._row.base_model)
        if row is None or row.pid == os.getpid() or row.state in ("stopped", "failed"):
            return None
        return row if row.heartbeat_at > now() - DEAD_AFTER_S and _may_run(row.pid) else None


def _may_run(pid: int) -> bool:
    """Whether a process of this host has that id; one that died without a word need not be waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True
