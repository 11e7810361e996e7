"""Learn within about two milliseconds that another process committed, without asking the tables.

SQLite bumps ``PRAGMA data_version`` of every other connection at each commit, and reading it touches only shared
memory (some 10 µs). PostgreSQL pushes: LISTEN and NOTIFY. It says "something changed", never what.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from typing import Protocol

import psycopg
from sqlalchemy.engine import make_url

_PROBE_S = 0.002
_CHANNEL = "tx_jobs"


class _Signal(Protocol):
    def wait(self, timeout: float) -> bool: ...
    def announce(self) -> None: ...
    def close(self) -> None: ...


class ChangeSignal:
    """One waiter's view of the database's changes. ``wait`` belongs to one thread; ``announce`` to any."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            self._signal: _Signal = _SqliteSignal(str(parsed.database))
        else:
            plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
            self._signal = _PostgresSignal(plain)

    def wait(self, timeout: float) -> bool:
        """True as soon as anything was committed since the last ``wait`` returned (or since construction).

        A commit that happened before the call counts: nothing between two waits is lost.
        """
        return self._signal.wait(timeout)

    def announce(self) -> None:
        """Wake every waiter. Call it after a commit (SQLite needs no word: the commit itself is one)."""
        self._signal.announce()

    def close(self) -> None:
        """Let go of the connections."""
        self._signal.close()


class _SqliteSignal:
    def __init__(self, file: str) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._seen = self._version()

    def wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while (version := self._version()) == self._seen:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_PROBE_S, left))
        self._seen = version
        return True

    def announce(self) -> None:
        pass

    def close(self) -> None:
        self._connection.close()

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])


class _PostgresSignal:
    def __init__(self, url: str) -> None:
        self._url = url
        # Two connections: a listener holds its own for as long as it waits.
        self._listener = self._listen()
        self._announcer: psycopg.Connection | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float) -> bool:
        try:
            heard = False
            for _ in self._listener.notifies(timeout=timeout, stop_after=1):
                heard = True
            return heard
        except psycopg.OperationalError:
            # The server went away; what it said meanwhile is lost, so the caller had better look.
            time.sleep(min(1.0, timeout))
            self._listener.close()
            self._listener = self._listen()
            return True

    def announce(self) -> None:
        with self._lock:
            try:
                self._notify()
            except psycopg.OperationalError:
                self._announcer = None
                self._notify()

    def close(self) -> None:
        self._listener.close()
        if self._announcer is not None:
            self._announcer.close()

    def _notify(self) -> None:
        if self._announcer is None or self._announcer.closed:
            self._announcer = psycopg.connect(self._url, autocommit=True)
        self._announcer.execute(f"NOTIFY {_CHANNEL}")

    def _listen(self) -> psycopg.Connection:
        connection = psycopg.connect(self._url, autocommit=True)
        connection.execute(f"LISTEN {_CHANNEL}")
        return connection
