"""Several API processes on one listening socket (``--api-workers``): their parent, and what a worker knows of it.

The parent opens the socket, supervises the engine and the workers, and serves nothing itself; a worker that dies is
started again while the others go on accepting. The parent tells every worker, through the pipe that also says that it
lives, what became of the engine: so each of them can tell clients the truth. No HTTP here, and no database.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tx.tinker.config import TxConfig
from tx.tinker.supervisor import PARENT_FD, Supervisor, engine_command

log = logging.getLogger(__name__)

LISTEN_FD = "TX_LISTEN_FD"
"""Environment variable with the number of the listening socket in a worker; it makes the process one."""

WORKER_NUMBER = "TX_API_WORKER"
"""Environment variable with a worker's number, from 1 on."""

FIRST = 1
"""The worker that does the housekeeping for all."""

CONNECTIONS = 64
_MIN_CONNECTIONS = 8
"""To the database, of all workers together and at least of each: PostgreSQL takes 100 unless it is told otherwise."""

_HARD_STOP_S = 3.0


@dataclass(frozen=True)
class EngineState:
    """What the parent knows of the engine's process: as ``tx.tinker.supervisor.Supervisor`` has it."""

    pid: int | None = None
    restarts: int = 0
    failure: str | None = None

    def to_line(self) -> bytes:
        """One line of JSON, without its end."""
        return json.dumps(asdict(self)).encode()


def run(config: TxConfig, listener: socket.socket) -> int:
    """Supervise until a signal, or until a child says that it can't start; the exit code."""
    wake_read, wake_write = os.pipe()
    exit_code = 0

    def leave(code: int) -> None:
        nonlocal exit_code
        exit_code = exit_code or code
        os.write(wake_write, b"!")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: leave(0))
    workers = [
        Supervisor(
            worker_command(config),
            config.to_environ() | {LISTEN_FD: str(listener.fileno()), WORKER_NUMBER: str(number)},
            name=f"API worker {number}",
            pass_fds=(listener.fileno(),),
            on_fatal=leave,
        )
        for number in range(FIRST, FIRST + config.api_workers)
    ]
    children = list(workers)
    if not config.external_engine:

        def tell() -> None:
            state = EngineState(engine.pid, engine.restarts, engine.failure)
            for worker in workers:
                worker.tell(state.to_line())

        engine = Supervisor(engine_command(config.to_argv()), config.to_environ(), on_fatal=leave, on_change=tell)
        children.append(engine)
    try:
        for child in reversed(children):  # the engine first: it takes longest
            child.start()
        os.read(wake_read, 1)
    finally:
        for child in children:
            child.terminate()
        for child in children:  # the engine last: it may still answer what the workers wait for
            child.stop()
    return exit_code


def worker_command(config: TxConfig) -> list[str]:
    """The command of one API process."""
    own = ["--api-workers", str(config.api_workers)]
    if config.api_keys_file is not None:
        own += ["--api-keys-file", str(config.api_keys_file)]
    if config.external_engine:
        own.append("--external-engine")
    return [sys.executable, "-m", "tx.tinker.api", *config.to_argv(), *own]


class Parent:
    """A worker's view of its parent: the socket, the engine's state, and whether the parent lives."""

    def __init__(self) -> None:
        """From the environment that ``run`` has made."""
        self.listener = socket.socket(fileno=int(os.environ[LISTEN_FD]))
        self.number = int(os.environ[WORKER_NUMBER])
        self._pipe = int(os.environ[PARENT_FD])
        self._state = EngineState()

    @staticmethod
    def made_us() -> bool:
        """Whether this process is a worker."""
        return LISTEN_FD in os.environ

    @property
    def pid(self) -> int | None:
        """Of the engine process that runs now."""
        return self._state.pid

    @property
    def restarts(self) -> int:
        """How often the engine had to be started again."""
        return self._state.restarts

    @property
    def failure(self) -> str | None:
        """Why there is no engine and will be none, if so."""
        return self._state.failure

    def watch(self, on_gone: Callable[[], None]) -> None:
        """From now on listen to the parent in a thread; when it is gone, so are we soon, whatever ``on_gone`` does."""
        threading.Thread(target=self._listen, args=(on_gone,), name="parent", daemon=True).start()

    def _listen(self, on_gone: Callable[[], None]) -> None:
        with open(self._pipe, "rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    self._state = EngineState(**json.loads(line))
        timer = threading.Timer(_HARD_STOP_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        on_gone()


def connections_of_each(config: TxConfig) -> int:
    """How many connections to the database one worker may have."""
    return max(_MIN_CONNECTIONS, CONNECTIONS // config.api_workers)
