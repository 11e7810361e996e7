"""The HTTP process: ``python -m tx.tinker.api --help``.

It validates requests, appends them to the job table, hands out results, and starts and watches the engine process. It
answers as soon as it listens, while the engine still loads: jobs wait in the table. It never loads JAX. With
``--api-workers`` it is only the parent of several that do this, and of the engine (``tx.tinker.api_workers``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from tx import __version__
from tx.errors import (
    StartupError,
)
from tx.tinker import api_workers, http_errors, openapi
from tx.tinker.auth import KeyRing
from tx.tinker.config import TxConfig, fail, parse_args
from tx.tinker.db import open_database
from tx.tinker.gate import PREFIX, Gate, statuses_at_the_gate
from tx.tinker.metrics import Metrics
from tx.tinker.routes import (
    admin,
    checkpoints,
    files,
    futures,
    models,
    runs,
    sampling,
    service,
    sessions,
    training,
    weights,
)
from tx.tinker.service import Service, service_of
from tx.tinker.slow_clients import Connection
from tx.tinker.supervisor import Supervisor, engine_command, say_ready
from tx.utils.garbage import collect_seldom
from tx.utils.log import set_up

log = logging.getLogger(__name__)

ROUTERS = (service, sessions, models, training, weights, sampling, futures, runs, checkpoints, files, admin)
_SPARE_FILES = 256
"""Descriptors that are not for connections: the database, files on their way out, the engine's pipes."""

_SWEEP_S = 300.0
_LOOK_FOR_ABANDONED_S = 10.0

_KEEP_ALIVE_S = 30
"""Longer than a client's heartbeats are apart: each would find its connection closed, or closing."""

_SWITCH_S = 0.0005
"""How long a thread that computes may keep the interpreter from the event loop; Python's own 5 ms add up."""


def create_app(service_: Service, *, keeps_house: bool = True) -> FastAPI:
    """The application around one service; closing the service is the caller's.

    Args:
        keeps_house: whether this process deletes what has expired; of several on one database one is enough, and more
            do no harm.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chores = [
            asyncio.create_task(_repeat(chore, every_s))
            for chore, every_s in (
                (service_.sweep, _SWEEP_S),
                (service_.cancel_abandoned, _LOOK_FOR_ABANDONED_S),
            )
            if keeps_house
        ]
        yield
        for chore in chores:
            chore.cancel()

    app = FastAPI(
        title="tx",
        version=__version__,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,  # to an address made of the client's own Host header
    )
    app.state.service = service_
    for module in ROUTERS:
        app.include_router(module.router, prefix=PREFIX, tags=[openapi.tag_of(module)])
    openapi.publish(app, ROUTERS, PREFIX, service_of, statuses_at_the_gate)
    http_errors.handle_in(app)
    app.add_middleware(Gate, service=service_)
    return app


async def _repeat(chore: Callable[[], object], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            await asyncio.to_thread(chore)
        except Exception:  # next time it may work; the service must not end for it
            log.exception("Housekeeping failed")


class _Server(uvicorn.Server):
    """Stops the long polls and the engine with the first signal instead of after the last connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        service_: Service,
        supervisor: Supervisor | None,
        on_listening: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._service = service_
        self._supervisor = supervisor
        self._on_listening = on_listening
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """From here on connections are accepted."""
        await super().startup(sockets)
        self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs in the signal handler: only flags and a signal to the engine."""
        self._service.watcher.stop()
        if self._supervisor is not None:
            self._supervisor.terminate()
        super().handle_exit(sig, frame)

    def on_engine_fatal(self, code: int) -> None:
        """The engine said why it can't start; so can't we."""
        self.exit_code = code
        self.leave()

    def leave(self) -> None:
        """Stop as a signal would; any thread may ask for it."""
        self._service.watcher.stop()
        self.should_exit = True


def run(config: TxConfig) -> int:
    """Serve until a signal; the exit code."""
    if not config.external_engine:
        config.check_demo()
    listener = _listen(config)
    host, port = listener.getsockname()[:2]
    if config.api_workers > 1:
        # Once for all workers: migrated, read and told, or said why it can't be.
        open_database(config.resolved_database_url).dispose()
        keys = KeyRing(config.api_keys_file) if config.api_keys_file is not None else None
        log.info("Listening on http://%s:%d, data in %s", host, port, config.data_folder)
        _tell_who_may_come(config, keys)
        try:
            return api_workers.run(config, listener)
        finally:
            log.info("Stopped.")
    service_ = Service(config, open_database(config.resolved_database_url))
    servers: list[_Server] = []
    supervisor = None
    if not config.external_engine:
        supervisor = Supervisor(
            engine_command(config.to_argv()),
            config.to_environ(),
            on_fatal=lambda code: servers[0].on_engine_fatal(code),
        )
        service_.engine_process = supervisor
    server = _Server(_uvicorn_config(config, create_app(service_)), service_, supervisor)
    servers.append(server)
    log.info("Listening on http://%s:%d, data in %s", host, port, config.data_folder)
    _tell_who_may_come(config, service_.auth.keys)
    try:
        if supervisor is not None:
            supervisor.start()
        collect_seldom()
        server.run(sockets=[listener])
    finally:
        if supervisor is not None:
            supervisor.stop()
        service_.close()
        log.info("Stopped.")
    return server.exit_code


def run_worker(config: TxConfig) -> int:
    """One of several API processes: serve until our parent says otherwise, or is gone; the exit code."""
    parent = api_workers.Parent()
    db = open_database(config.resolved_database_url, api_workers.connections_of_each(config))
    service_ = Service(config, db, None if config.external_engine else parent)
    service_.metrics = Metrics(api_worker=str(parent.number))
    app = create_app(service_, keeps_house=parent.number == api_workers.FIRST)
    server = _Server(_uvicorn_config(config, app), service_, None, on_listening=say_ready)
    parent.watch(server.leave)
    collect_seldom()
    try:
        server.run(sockets=[parent.listener])
    finally:
        service_.close()
    return server.exit_code


def _uvicorn_config(config: TxConfig, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        limit_concurrency=max(_SPARE_FILES, _file_limit() - _SPARE_FILES),
        log_config=None,
        access_log=False,
        log_level="info" if config.log_level == "debug" else "warning",  # what uvicorn has to tell, we tell
        timeout_graceful_shutdown=1,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


def _tell_who_may_come(config: TxConfig, keys: KeyRing | None) -> None:
    if keys is not None:
        log.info("%d API keys may enter; each finds what is its own", len(keys))
    elif config.is_local:
        log.info("No --api-keys-file: any key is accepted, and only this machine can reach the server")
    else:
        log.warning(
            "No --api-keys-file, and --host %s: WHOEVER REACHES THIS ADDRESS OWNS EVERYTHING HERE and may read, train, "
            "publish and delete it. Make keys with `python -m tx.tinker.keys add NAME --file FILE`.",
            config.host,
        )


def _file_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 65536


def _listen(config: TxConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"Can't listen on {config.host}:{config.port}: {reason}.") from error


def _raise_file_limit() -> None:
    """Without TLS, every call in flight is a connection, and a client may have hundreds (protocol §1.3)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse_args(sys.argv[1:] if argv is None else argv, prog="python -m tx.tinker.api")
    set_up("api", config.log_level)
    _raise_file_limit()
    sys.setswitchinterval(_SWITCH_S)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        _make_data_folder(config)
        return run_worker(config) if api_workers.Parent.made_us() else run(config)
    except StartupError as error:
        fail(error)


def _make_data_folder(config: TxConfig) -> None:
    try:
        config.data_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"--data-dir {config.data_folder} can't be made: {error.strerror}.") from error


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """What uvicorn's own handler falls back to when it is done: unwind and exit with code 0."""
    raise SystemExit(0)


def _main_process() -> NoReturn:
    """Leave without finalising the interpreter: all is closed by now, and that would cost a second or more."""
    code = 1
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        log.exception("The API process failed")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main_process()
