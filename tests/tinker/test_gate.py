"""What every request passes: limits of a body, an answer for the unforeseen. Keys and rates: ``test_isolation``."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tx.tinker import gate
from tx.tinker.api import create_app


def test_a_body_past_the_limit_is_413_and_the_server_goes_on(client, monkeypatch):
    monkeypatch.setattr(gate, "MAX_BODY_BYTES", 1000)
    reply = client.post("asample", content=b"x" * 1001)
    assert reply.status_code == 413
    assert reply.json()["detail"].startswith("body: got '1001 bytes'") or "1001 bytes" in reply.json()["detail"]
    assert client.post("create_session", json={}).status_code == 200


def test_an_unforeseen_error_is_one_500_and_the_server_goes_on(client, monkeypatch, caplog):
    monkeypatch.setattr(client.service.sessions, "recent", lambda *_: 1 / 0)
    with TestClient(create_app(client.service), base_url="http://test/api/v1/") as other:
        reply = other.get("sessions")
        assert reply.status_code == 500
        name = reply.json()["detail"].split()[2].rstrip(";")
        assert "ZeroDivisionError" not in reply.text
        assert any(name in record.getMessage() for record in caplog.records)
        assert other.get("get_server_capabilities").status_code == 200
