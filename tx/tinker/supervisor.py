"""Start a process, watch it, start it again when it dies, stop it in time. It never looks inside.

The child holds the read end of a pipe whose write end only this process has: when this process dies, however it dies,
the child reads end-of-file and exits, so there are no orphans. What it is to know meanwhile comes through the same
pipe, a line each. Through a second pipe the child says that it is ready. A child that follows one which was killed
(SIGKILL, and not by a kernel out of memory) is told so.

An engine that dies again and again before it is of use is a failure that ``/healthz`` tells of. It is still started
again, once a minute: whatever keeps it down (a full disk, a database that is away) may go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

PARENT_FD = "TX_PARENT_FD"
"""Environment variable with the number of the pipe's read end in the child."""

READY_FD = "TX_READY_FD"
"""Environment variable with the number of a pipe's write end: a byte says that the child is ready."""

KILLED = "TX_KILLED"
"""Environment variable of a child whose predecessor somebody killed, so that nothing that it did is to blame."""

EXIT_STARTUP = 2
"""The child said in one sentence why it can't start; starting it again would not help."""

_STOP_GRACE_S = 3.0
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 60.0
_OF_USE_S = 10.0
"""An engine that was ready for so long was of use: when it dies, counting and back-off start anew."""

MAX_DEATHS = 5
"""So many deaths in a row, none of an engine that was of use, are a failure."""


class Supervisor:
    """Owner of one process, the engine or an API process."""

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str] | None = None,
        *,
        name: str = "engine",
        pass_fds: Sequence[int] = (),
        on_fatal: Callable[[int], None] = lambda code: None,
        on_change: Callable[[], None] = lambda: None,
        first_backoff_s: float = _FIRST_BACKOFF_S,
        of_use_s: float = _OF_USE_S,
    ) -> None:
        """The process is not started yet.

        Args:
            argv: the whole command.
            name: what log and failures call it.
            pass_fds: descriptors that it inherits.
            on_fatal: called (in a thread) when it can't start at all.
            on_change: called after ``pid``, ``restarts`` or ``failure`` have changed.

        Attributes:
            restarts: how often it had to be started again.
            failure: why there is none that is of use, until there is one.
        """
        self._argv = list(argv)
        self._environ = dict(environ or {})
        self._name = name
        self._pass_fds = tuple(pass_fds)
        self._on_fatal = on_fatal
        self._on_change = on_change
        self._told = b""
        self._first_backoff_s = first_backoff_s
        self._of_use_s = of_use_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process_pipes: tuple[int, int] | None = None  # to tell it something, to hear that it is ready
        self._thread: threading.Thread | None = None
        self.restarts = 0
        self.failure: str | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the one that runs now."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the process and the thread that watches it."""
        self._spawn()
        self._thread = threading.Thread(target=self._watch, name="supervise", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """SIGTERM, a grace period, SIGKILL. Returns when it is gone; may be called twice."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("The %s did not stop within %g s; killing it.", self._name, _STOP_GRACE_S)
                process.kill()
                process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def terminate(self) -> None:
        """Ask the process to stop, without waiting: for a signal handler, before ``stop``."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def tell(self, line: bytes) -> None:
        """Let the process read this line; one that is started later reads only the last."""
        with self._lock:
            self._told = line
            self._write(line)

    def _write(self, line: bytes) -> None:
        if self._process_pipes is not None and line:
            with contextlib.suppress(OSError):  # it is dead, or has not read for very long
                os.write(self._process_pipes[0], line + b"\n")

    def _spawn(self, killed: bool = False) -> None:
        read_end, write_end = os.pipe()
        ready_read, ready_write = os.pipe()
        try:
            with self._lock:
                if self._stopping.is_set():
                    return
                told = {PARENT_FD: str(read_end), READY_FD: str(ready_write), KILLED: "1" if killed else ""}
                self._process = subprocess.Popen(
                    self._argv,
                    env=os.environ | self._environ | told,
                    pass_fds=(read_end, ready_write, *self._pass_fds),
                    stdin=subprocess.DEVNULL,
                    # Ctrl-C in the terminal reaches only this process, which then stops the others in order.
                    start_new_session=True,
                )
                os.set_blocking(write_end, False)
                self._process_pipes = write_end, ready_read
                write_end = ready_read = -1
                self._write(self._told)
        finally:
            for descriptor in (read_end, write_end, ready_read, ready_write):
                if descriptor >= 0:
                    os.close(descriptor)
        self._on_change()

    def _watch(self) -> None:
        backoff_s, deaths = self._first_backoff_s, 0
        while self._process is not None:
            num_oom_kills = _num_oom_kills()
            ready_at, code = self._await_death(self._process)
            if self._stopping.is_set():
                return
            if code == EXIT_STARTUP and self.restarts == 0:
                self.failure = f"The {self._name} can't start; its message is in the log."
                self._on_change()
                self._on_fatal(code)
                return
            if ready_at is not None and time.monotonic() - ready_at > self._of_use_s:
                backoff_s, deaths = self._first_backoff_s, 0
            deaths += 1
            if deaths >= MAX_DEATHS:
                self.failure = (
                    f"The {self._name} died {deaths} times in a row, the last time with exit code {code}; its log says "
                    f"why. It is started again every {_MAX_BACKOFF_S:.0f} s."
                )
                backoff_s = max(backoff_s, _MAX_BACKOFF_S)
            self._on_change()
            log.error("The %s exited with code %d; starting it again in %.1f s.", self._name, code, backoff_s)
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            self.restarts += 1
            self._spawn(killed=code == -signal.SIGKILL and num_oom_kills == _num_oom_kills() != -1)

    def _await_death(self, process: subprocess.Popen[bytes]) -> tuple[float | None, int]:
        """When the engine got ready, if it did, and its exit code."""
        assert self._process_pipes is not None  # there is a process
        parent_pipe, ready_pipe = self._process_pipes
        ready_at = None
        while os.read(ready_pipe, 1):  # end-of-file comes with its death
            ready_at = time.monotonic()
            self.failure = None
            self._on_change()
        code = process.wait()
        with self._lock:
            self._process_pipes = None
            os.close(parent_pipe)
            os.close(ready_pipe)
        return ready_at, code


def _num_oom_kills() -> int:
    """How many processes this kernel has killed for want of memory; -1 if it doesn't say."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1])
    return -1


def was_killed() -> bool:
    """In a supervised process: whether the one before it was killed by somebody, for no fault of its own."""
    return bool(os.environ.get(KILLED))


def say_ready() -> None:
    """In a supervised process: tell the parent, if there is one that asked to know."""
    if (descriptor := os.environ.get(READY_FD)) is not None:
        with contextlib.suppress(OSError):  # it is gone, and so are we in an instant
            os.write(int(descriptor), b"r")


def engine_command(argv: Sequence[str]) -> list[str]:
    """The command of tx's own engine."""
    return [sys.executable, "-m", "tx.tinker.engine", *argv]
