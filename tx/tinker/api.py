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
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tx import __version__
from tx.errors import (
    Forbidden,
    InvalidInput,
    NotFound,
    Overloaded,
    StartupError,
    TooLarge,
    TooSlow,
    TxError,
    Unauthorized,
)
from tx.tinker import api_workers, openapi
from tx.tinker.auth import ANYBODY, KeyRing
from tx.tinker.config import TxConfig, fail, parse_args
from tx.tinker.db import open_database
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
from tx.tinker.slow_clients import Connection, body_deadline
from tx.tinker.supervisor import Supervisor, engine_command, say_ready
from tx.utils.log import set_up

log = logging.getLogger(__name__)

PREFIX = "/api/v1"
ROUTERS = (service, sessions, models, training, weights, sampling, futures, runs, checkpoints, files, admin)
MAX_BODY_BYTES = 64 * 2**20
_DRAIN_BYTES = 2**30
"""How much of a body past the limit is read and thrown away, so that its sender gets to see the 413."""

_SPARE_FILES = 256
"""Descriptors that are not for connections: the database, files on their way out, the engine's pipes."""

_OPEN = (f"{PREFIX}/healthz", f"{PREFIX}/files/")
"""Paths that need no API key: one whole, and all that begin like the other, whose URLs are signed."""

_UNCOUNTED = f"{PREFIX}/session_heartbeat"
"""Never refused for its key's rate: a client that is told to wait is not one that has died."""

_NO_NUL = "text without NUL characters"

_SWEEP_S = 300.0
_LOOK_FOR_ABANDONED_S = 10.0

STATUS: dict[type[Exception], int] = {
    NotFound: 404,
    TooLarge: 413,
    InvalidInput: 400,
    Unauthorized: 401,
    Forbidden: 403,
    TooSlow: 408,
    Overloaded: 429,
    TxError: 500,
    PoolTimeout: 503,
    DBAPIError: 503,
}
"""Errors to HTTP, the first class that fits. Never 409: clients retry it for minutes (protocol §1.6)."""


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
    openapi.publish(app, ROUTERS, PREFIX, service_of, _statuses_at_the_gate)
    for kind in STATUS:
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(_Gate, service=service_)
    return app


def status_of(error: Exception) -> int:
    """HTTP status of an exception."""
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


async def _on_error(_request: Request, error: Exception) -> JSONResponse:
    status = status_of(error)
    if isinstance(error, TxError):
        return _reply(status, str(error), _headers_of(error))
    log.warning("Database: %s", error)
    return _reply(status, "The database is not available at the moment; try again.")


def _headers_of(error: TxError) -> dict[str, str] | None:
    if isinstance(error, Overloaded):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Unauthorized) and error.invalid_token:
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # clients get a new one and ask again
    return {"Connection": "close"} if isinstance(error, TooSlow) else None


async def _on_validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _reply(422, str(InvalidInput(str(first["loc"][-1]), first.get("input"), first["msg"])))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code in (404, 405):
        detail = f"{detail}: {request.method} {request.url.path} is not served here."
    return _reply(error.status_code, detail)


def _reply(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail or "No details."}, status_code=status, headers=headers)


_IN_TURNS = {f"{PREFIX}/{name}" for name in ("asample", "forward_backward", "forward", "optim_step", "retrieve_future")}
"""Routes whose requests come by the thousand at once."""


class _Gate:
    """Around everything: who asks, what no address and no body may be, turns, an answer for the unforeseen, a count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._admit(scope)
                _check_address(scope)
            except (Unauthorized, Overloaded, InvalidInput):
                await _read_body(receive, keep=False)  # who still writes would not read our answer
                raise
            body = await _read_body(receive)
            async with self._service.turns if scope["path"] in _IN_TURNS else contextlib.nullcontext():
                await self._app(scope, _replay(body, receive), counted_send)
        except TxError as error:  # ours: those of the routes are answered inside
            await _reply(status_of(error), str(error), _headers_of(error))(scope, receive, counted_send)
        except Exception:
            name = uuid.uuid4().hex[:8]
            log.exception("Request %s %s failed [%s]", scope["method"], scope["path"], name)
            if status == 0:
                await _reply(500, f"Internal error {name}; the server's log has more.")(scope, receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._service.metrics.count("tx_http_requests_total", route=route, status=str(status))
            self._service.metrics.observe("tx_http_request_seconds", time.monotonic() - started, route=route)

    def _admit(self, scope: Scope) -> None:
        """Find the caller and note him for the routes; raises Unauthorized or Overloaded."""
        statuses, caller, auth = _statuses_at_the_gate(scope["path"]), ANYBODY, self._service.auth
        if 401 in statuses:
            caller = auth.caller(dict(scope["headers"]))
        if 429 in statuses:
            auth.count(caller)
        scope.setdefault("state", {})["caller"] = caller


def _statuses_at_the_gate(path: str) -> tuple[int, ...]:
    """How a request may be refused for its key, or for the rate of that."""
    if path == _OPEN[0] or path.startswith(_OPEN[1]):
        return ()
    return (401,) if path == _UNCOUNTED else (401, 429)


def _check_address(scope: Scope) -> None:
    """Refuse NUL characters wherever a parameter can be: PostgreSQL can't even be asked for them."""
    if "\0" in scope["path"]:
        raise InvalidInput("path", scope["path"], _NO_NUL)
    if b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        raise InvalidInput("query", scope["query_string"].decode("latin-1"), _NO_NUL)
    for name, value in scope["headers"]:
        if b"\0" in value:
            raise InvalidInput(name.decode("latin-1"), value.decode("latin-1"), _NO_NUL)


async def _read_body(receive: Receive, *, keep: bool = True) -> bytes:
    """The whole body. One past the limit is read on and thrown away: who still writes would not read our answer.

    Raises:
        TooLarge, TooSlow: there is too much of it, or it takes too long.
    """
    parts: list[bytes] = []
    size, started = 0, asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(body_deadline(started, size)):
                message = await receive()
        except TimeoutError as error:
            raise TooSlow(f"body: {size} bytes came in time, and then no more. Send it again, faster.") from error
        if message["type"] != "http.request":
            return b""  # the client hung up; nobody will see the answer
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY_BYTES and keep:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > _DRAIN_BYTES:
            break
    if size > MAX_BODY_BYTES and keep:
        raise TooLarge("body", f"{size} bytes", f"at most {MAX_BODY_BYTES} bytes")
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


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
