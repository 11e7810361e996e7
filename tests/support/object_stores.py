"""Object stores for tests: a real S3 endpoint in this process, and a wrapper that fails when told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import httpx

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}

_LIMIT_S = 60.0
"""The first request loads half of moto, which takes its time on a busy machine."""


class S3Server:
    """moto's S3 over HTTP; ``environment`` is what a client needs."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": self.url}

    def make_bucket(self, name: str) -> None:
        httpx.put(f"{self.url}/{name}", timeout=_LIMIT_S).raise_for_status()

    def keys(self, bucket: str) -> list[str]:
        """Every key of a bucket, without our client."""
        listing = httpx.get(f"{self.url}/{bucket}?list-type=2", timeout=_LIMIT_S).raise_for_status().text
        return [piece.partition("</Key>")[0] for piece in listing.split("<Key>")[1:]]

    def close(self) -> None:
        self._server.stop()


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """URL of a server that answers everything like this."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_HEAD = do_POST = do_DELETE = do_PUT

        def log_message(self, *_: object) -> None:
            pass

    with _serving(Handler) as url:
        yield url


@contextmanager
def silent() -> Iterator[str]:
    """URL of a server that takes requests and never answers."""
    over = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            over.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    with _serving(Handler) as url:
        yield url
        over.set()


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class WatchedStore:
    """An obstore store around another; ``before`` is called with the name of each operation and its path."""

    def __init__(self, store: Any, before: Callable[[str, object], None]) -> None:
        self._store = store
        self.before = before

    def __getattr__(self, name: str) -> Callable[..., Any]:
        real = getattr(self._store, name)

        def watched(*args: Any, **options: Any) -> Any:
            self.before(name, args[0])
            return real(*args, **options)

        return watched
