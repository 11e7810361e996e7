"""Who sends nothing, or too slowly, is cut off; who waits for an answer is not. A real server on a real socket."""

from __future__ import annotations

import socket
import threading

import pytest
import uvicorn

from tx.tinker import gate, slow_clients
from tx.tinker.api import create_app
from tx.tinker.slow_clients import BODY_S, MAX_HEADERS_BYTES, MIN_BODY_BYTES_PER_S, Connection, body_deadline

POST = b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"


@pytest.fixture
def address(service, engine):
    listener = socket.create_server(("127.0.0.1", 0))
    options = {"log_config": None, "timeout_graceful_shutdown": 1, "timeout_keep_alive": 60}
    server = uvicorn.Server(uvicorn.Config(create_app(service), http=Connection, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def connect(address) -> socket.socket:
    return socket.create_connection(address, timeout=60)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_come_close_the_connection(address, monkeypatch, sent):
    monkeypatch.setattr(slow_clients, "HEADERS_S", 0.1)
    with connect(address) as connection:
        connection.sendall(sent)
        assert read_all(connection) == b""


def test_so_do_those_of_a_second_request(address, monkeypatch):
    with connect(address) as connection:
        connection.sendall(POST + b"{}")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(slow_clients, "HEADERS_S", 0.1)
        connection.sendall(b"POST /api")
        assert read_all(connection) == b""


def test_headers_without_end_are_a_400_and_a_closed_connection(address):
    line = b"x: " + b"a" * 1019 + b"\r\n"
    most = POST.removesuffix(b"\r\n") + line * (MAX_HEADERS_BYTES // len(line) - 1)
    with connect(address) as connection:
        for _ in range(2):
            connection.sendall(most + b"\r\n{}")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(most + 2 * line)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert str(MAX_HEADERS_BYTES).encode() in answer


def test_a_body_that_does_not_come_is_a_408_and_others_are_served(address, monkeypatch):
    monkeypatch.setattr(slow_clients, "BODY_S", 0.1)
    with connect(address) as slow, connect(address) as other:
        slow.sendall(POST + b"{")
        answer = read_all(slow)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body: 1 bytes came in time" in answer
        other.sendall(POST + b"{}")
        assert other.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_waits_for_an_answer_is_left_alone(address, monkeypatch, client):
    monkeypatch.setattr(slow_clients, "HEADERS_S", 0.05)
    monkeypatch.setattr(slow_clients, "BODY_S", 0.05)
    client.service.hold_s = 0.5
    future = client.sample(client.new_sampler())  # which no engine answers
    body = f'{{"request_id": "{future["request_id"]}"}}'.encode()
    head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with connect(address) as connection:
        connection.sendall(head + body)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"try_again" in answer


def test_a_body_has_time_for_its_length_and_not_for_drops():
    assert body_deadline(5.0, 0) == 5.0 + BODY_S
    largest = gate.MAX_BODY_BYTES
    assert body_deadline(0.0, largest) == BODY_S + largest / MIN_BODY_BYTES_PER_S
    assert body_deadline(0.0, 60) < BODY_S + 1  # a byte per second for a minute buys no second
