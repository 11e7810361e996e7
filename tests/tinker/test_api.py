"""The application as a whole: errors to HTTP, body limits, and the process's start and end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from tx import errors
from tx.tinker import api
from tx.tinker.api import create_app, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidInput("f", 1, "2"), 400),
        (errors.Unsupported("f", 1, "2"), 400),
        (errors.NotFound("f", 1, "2"), 404),
        (errors.TooLarge("f", 1, "2"), 413),
        (errors.Overloaded("later"), 429),
        (errors.ModelLost("gone"), 500),
        (RuntimeError("bug"), 500),
    ],
)
def test_errors_to_http(error, status):
    assert status_of(error) == status


def test_409_is_never_answered():
    assert 409 not in api.STATUS.values()


def test_a_body_past_the_limit_is_413_and_the_server_goes_on(client, monkeypatch):
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1000)
    reply = client.post("asample", content=b"x" * 1001)
    assert reply.status_code == 413
    assert reply.json()["detail"].startswith("body: got '1001 bytes'") or "1001 bytes" in reply.json()["detail"]
    assert client.post("create_session", json={}).status_code == 200


def test_a_slash_too_many_is_404_and_no_redirect(client):
    reply = client.get("/api/v1/sessions/", headers={"Host": "elsewhere"}, follow_redirects=False)
    assert reply.status_code == 404, reply.headers


def test_an_unforeseen_error_is_one_500_and_the_server_goes_on(client, monkeypatch, caplog):
    monkeypatch.setattr(client.service.sessions, "recent", lambda *_: 1 / 0)
    with TestClient(create_app(client.service), base_url="http://test/api/v1/") as other:
        reply = other.get("sessions")
        assert reply.status_code == 500
        name = reply.json()["detail"].split()[2].rstrip(";")
        assert "ZeroDivisionError" not in reply.text
        assert any(name in record.getMessage() for record in caplog.records)
        assert other.get("get_server_capabilities").status_code == 200


def test_every_error_has_a_body_and_its_length(client):
    """A 400 without them is taken for a proxy's and retried (protocol §1.6)."""
    for reply in (client.get("nothing/here"), client.get("create_session"), client.post("optim_step", content=b"{")):
        assert reply.status_code in (400, 404, 405)
        assert reply.json()["detail"]
        assert int(reply.headers["content-length"]) == len(reply.content)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(tmp_path, port: int, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tx.tinker.api", "--data-dir", str(tmp_path), "--port", str(port), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_listening(port: int) -> httpx.Response:
    with httpx.Client(timeout=60) as http:
        for _ in range(3000):
            try:
                return http.get(f"http://127.0.0.1:{port}/api/v1/healthz")
            except httpx.TransportError:
                time.sleep(0.02)
    raise AssertionError("it never listened")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_process_answers_at_once_and_stops_within_five_seconds(tmp_path, number):
    port = free_port()
    process = start(tmp_path, port, "--external-engine", "--base-model", "org/base")
    assert wait_listening(port).json()["status"] == "starting"
    process.send_signal(number)
    _, log = process.communicate(timeout=5)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert f"127.0.0.1:{port}" in log


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path, taken.getsockname()[1], "--external-engine", "--base-model", "org/base")
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert log.startswith("tx: Can't listen on")
    assert log.count("\n") == 1


def test_a_bad_database_is_one_sentence(tmp_path):
    flags = ["--external-engine", "--base-model", "m", "--database-url", "mysql://x/y"]
    process = start(tmp_path, free_port(), *flags)
    _, log = process.communicate(timeout=60)
    assert (process.returncode, log.count("\n")) == (2, 1)


def test_the_process_never_loads_jax():
    code = "import sys, tx.tinker.api; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
