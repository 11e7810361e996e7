"""The application as a whole, and the process's start and end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest


def test_a_slash_too_many_is_404_and_no_redirect(client):
    reply = client.get("/api/v1/sessions/", headers={"Host": "elsewhere"}, follow_redirects=False)
    assert reply.status_code == 404, reply.headers


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
