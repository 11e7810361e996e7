"""Learn within a millisecond that another process appended or finished jobs, without asking the tables.

On PostgreSQL it is LISTEN and NOTIFY. On SQLite every waiter has a named pipe in a folder beside the database, and who
announces writes a byte into each; a waiter sleeps in the kernel meanwhile. Commits that nobody announces are found by
``PRAGMA data_version``, which every commit of another connection bumps and which costs some 5 µs.

It says that something happened, never what: whoever wakes looks into the tables.
"""

from __future__ import annotations

import contextlib
import os
import select
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Literal, Protocol

import psycopg
from sqlalchemy.engine import make_url

type Topic = Literal["appended", "finished"]
"""Jobs that wait for an engine (or were taken from it), or jobs that are over."""

TOPICS: tuple[Topic, ...] = ("appended", "finished")

PROBE_S = 0.05
"""How long a commit that nobody announces may go unnoticed."""

_PROBE_WITHOUT_PIPE_S = 0.002


class _Signal(Protocol):
    def wait(self, timeout: float) -> bool: ...
    def announce(self, topics: tuple[Topic, ...]) -> None: ...
    def close(self) -> None: ...


class ChangeSignal:
    """One waiter's view of the database's changes. ``wait`` belongs to one thread; ``announce`` to any.

    Args:
        hears: what wakes this one at once; on SQLite any other commit still does after ``PROBE_S``. Whoever only
            announces hears nothing: PostgreSQL keeps what a listener doesn't fetch.
    """

    def __init__(self, url: str, hears: tuple[Topic, ...] = TOPICS) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            self._signal: _Signal = _SqliteSignal(str(parsed.database), hears)
        else:
            plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
            self._signal = _PostgresSignal(plain, hears)

    def wait(self, timeout: float) -> bool:
        """True as soon as something happened since the last ``wait`` returned True (or since construction).

        What was announced before the call counts: nothing between two waits is lost.
        """
        return self._signal.wait(timeout)

    def announce(self, *topics: Topic) -> None:
        """Wake whoever hears one of these (none named: all of them). Call it after the commit."""
        self._signal.announce(topics or TOPICS)

    def close(self) -> None:
        """Let go of connections and pipes."""
        self._signal.close()


class _SqliteSignal:
    def __init__(self, file: str, hears: tuple[Topic, ...]) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._folder = Path(f"{file}-wake")
        self._hears = hears
        self._pipe: _Pipe | None = None
        self._probe_s = PROBE_S
        self._next_probe = 0.0
        self._seen = self._version()

    def wait(self, timeout: float) -> bool:
        if self._pipe is None and self._probe_s == PROBE_S:
            try:
                self._pipe = _Pipe(self._folder, self._hears)
            except OSError:  # a file system without pipes
                self._probe_s = _PROBE_WITHOUT_PIPE_S
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if self._probed() or self._heard(max(0.0, min(left, self._next_probe - time.monotonic()))):
                return True
            if left <= 0:
                return False

    def announce(self, topics: tuple[Topic, ...]) -> None:
        _write_to_pipes(self._folder, topics)

    def close(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        self._connection.close()

    def _probed(self) -> bool:
        """Whether there was any commit, asked no more often than every ``_probe_s``."""
        if time.monotonic() < self._next_probe:
            return False
        self._next_probe = time.monotonic() + self._probe_s
        before, self._seen = self._seen, self._version()
        return self._seen != before

    def _heard(self, timeout: float) -> bool:
        if self._pipe is None:
            time.sleep(timeout)
            return False
        if not self._pipe.wait(timeout):
            return False
        self._seen = self._version()  # the commit that was announced is not news a second time
        return True

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])


class _Pipe:
    """A named pipe that only this waiter reads; its name says what it hears: ``appended+finished.3f2a``."""

    def __init__(self, folder: Path, hears: tuple[Topic, ...]) -> None:
        folder.mkdir(exist_ok=True)
        name = f"{'+'.join(hears)}.{uuid.uuid4().hex}"
        self._path, hidden = folder / name, folder / f".{name}"
        os.mkfifo(hidden, 0o600)
        self._descriptor = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
        hidden.rename(self._path)  # seen only now that it has a reader: one without is taken for a dead process's
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def wait(self, timeout: float) -> bool:
        if not self._poll.poll(1000 * timeout):
            return False
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._descriptor, 4096)) == 4096:
                pass
        return True

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _write_to_pipes(folder: Path, topics: tuple[Topic, ...]) -> None:
    try:
        names = os.listdir(folder)
    except OSError:
        return  # nobody has ever waited, or nobody can have a pipe
    for name in names:
        if not set(name.partition(".")[0].split("+")) & set(topics):
            continue
        try:
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # its reader is gone, maybe without a word
            (folder / name).unlink(missing_ok=True)
            continue
        try:
            os.write(descriptor, b"!")
        except OSError:
            pass  # full of bytes that say the same, or closed this very moment
        finally:
            os.close(descriptor)


class _PostgresSignal:
    def __init__(self, url: str, hears: tuple[Topic, ...]) -> None:
        self._url = url
        self._hears = hears
        # Two connections: a listener holds its own for as long as it waits.
        self._listener = self._listen() if hears else None
        self._announcer: psycopg.Connection | None = None
        self._lock = threading.Lock()

    def wait(self, timeout: float) -> bool:
        if self._listener is None:
            time.sleep(timeout)
            return False
        try:
            heard = False
            for _ in self._listener.notifies(timeout=timeout, stop_after=1):
                heard = True
            return heard
        except psycopg.Error:
            # The server went away, or became one that can't notify; what it said meanwhile is lost, so the caller had
            # better look.
            time.sleep(min(1.0, timeout))
            self._listener.close()
            with contextlib.suppress(psycopg.Error):  # it is away still: the next wait tries again
                self._listener = self._listen()
            return True

    def announce(self, topics: tuple[Topic, ...]) -> None:
        with self._lock:
            try:
                self._notify(topics)
            except psycopg.Error:
                self._announcer = None
                # What we tell of is committed. Without a server, those who listen have lost it too, and will look.
                with contextlib.suppress(psycopg.Error):
                    self._notify(topics)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._announcer is not None:
            self._announcer.close()

    def _notify(self, topics: tuple[Topic, ...]) -> None:
        if self._announcer is None or self._announcer.closed:
            self._announcer = psycopg.connect(self._url, autocommit=True)
        for topic in topics:
            self._announcer.execute(f"NOTIFY tx_{topic}".encode())

    def _listen(self) -> psycopg.Connection:
        connection = psycopg.connect(self._url, autocommit=True)
        for topic in self._hears:
            connection.execute(f"LISTEN tx_{topic}".encode())
        return connection
