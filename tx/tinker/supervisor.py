"""Start the engine process, watch it, start it again when it dies, stop it in time. It never looks inside.

The child holds the read end of a pipe whose write end only this process has: when this process dies, however it dies,
the engine reads end-of-file and exits, so there are no orphans.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

PARENT_FD = "TX_PARENT_FD"
"""Environment variable with the number of the pipe's read end in the engine process."""

EXIT_STARTUP = 2
"""The engine said in one sentence why it can't start; starting it again would not help."""

_STOP_GRACE_S = 3.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 30.0
_STABLE_S = 60.0
"""An engine that lived this long starts the back-off anew when it dies."""


class Supervisor:
    """Owner of one engine process."""

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str] | None = None,
        *,
        on_fatal: Callable[[int], None] = lambda code: None,
        first_backoff_s: float = _FIRST_BACKOFF_S,
    ) -> None:
        """``argv``: the whole command. ``on_fatal``: called (in a thread) when the engine can't start at all."""
        self._argv = list(argv)
        self._environ = dict(environ or {})
        self._on_fatal = on_fatal
        self._first_backoff_s = first_backoff_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.restarts = 0
        self.failure: str | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the engine and the thread that watches it."""
        self._spawn()
        self._thread = threading.Thread(target=self._watch, name="supervise", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """SIGTERM, a grace period, SIGKILL. Returns when the engine is gone; may be called twice."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                log.warning("The engine did not stop within %g s; killing it.", _STOP_GRACE_S)
                process.kill()
                process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def terminate(self) -> None:
        """Ask the engine to stop, without waiting: for a signal handler, before ``stop``."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def _spawn(self) -> None:
        read_end, write_end = os.pipe()
        try:
            with self._lock:
                if self._stopping.is_set():
                    return
                self._process = subprocess.Popen(
                    self._argv,
                    env=os.environ | self._environ | {PARENT_FD: str(read_end)},
                    pass_fds=(read_end,),
                    stdin=subprocess.DEVNULL,
                    # Ctrl-C in the terminal reaches only this process, which then stops the engine in order.
                    start_new_session=True,
                )
                self._process_pipe = write_end
                write_end = -1
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)

    def _watch(self) -> None:
        backoff_s = self._first_backoff_s
        while self._process is not None:
            started = time.monotonic()
            code = self._process.wait()
            os.close(self._process_pipe)
            if self._stopping.is_set():
                return
            if code == EXIT_STARTUP and self.restarts == 0:
                self.failure = "The engine can't start; its message is in the log."
                self._on_fatal(code)
                return
            if time.monotonic() - started > _STABLE_S:
                backoff_s = self._first_backoff_s
            log.error("The engine exited with code %d; starting it again in %.1f s.", code, backoff_s)
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            self.restarts += 1
            self._spawn()


def engine_command(argv: Sequence[str]) -> list[str]:
    """The command of tx's own engine."""
    return [sys.executable, "-m", "tx.tinker.engine", *argv]
