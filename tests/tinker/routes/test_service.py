"""Health, configuration, capabilities, telemetry, metrics over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest


class Process:
    """Stands for the supervisor."""

    pid: int | None = 1
    restarts = 0
    failure: str | None = None


@pytest.mark.parametrize(
    ("beat", "process", "status"),
    [
        ({"state": "ready"}, {}, "ok"),
        ({"state": "starting"}, {}, "starting"),
        ({"state": "recovering"}, {}, "recovering"),
        ({"state": "failed"}, {}, "failed"),
        ({"state": "stopped"}, {}, "failed"),
        ({"state": "ready", "age_s": 60.0}, {}, "failed"),
        ({"state": "ready"}, {"pid": 2}, "starting"),
        ({"state": "ready"}, {"pid": None, "restarts": 1}, "recovering"),
        ({"state": "ready"}, {"failure": "no weights"}, "failed"),
    ],
)
def test_health_tells_the_truth_about_the_engine(client, engine, beat, process, status):
    client.service.engine_process = Process()
    vars(client.service.engine_process).update(process)
    engine.beat(**beat)
    reply = client.get("healthz")
    assert reply.json()["status"] == status
    assert reply.status_code == (200 if status == "ok" else 503)


def test_the_api_lives_without_an_engine_and_without_a_database(client):
    client.service.db.dispose()
    Path(client.service.db.url.database).unlink()
    assert client.get("healthz").status_code == 503
    reply = client.get("livez")
    assert (reply.status_code, reply.json()) == (200, {"status": "alive"})


def test_capabilities_list_every_name(client, engine):
    models = client.get("get_server_capabilities").json()["supported_models"]
    assert [model["model_name"] for model in models] == ["org/base", "org/alias"]
    assert models[0] == {
        "model_name": "org/base",
        "max_context_length": 512,
        "trainable": True,
        "sampleable": True,
    }


def test_client_config_is_answered(client):
    config = client.ask("client/config", sdk_version="0.38.0")
    assert config["sample_max_concurrent_requests"] > 0
    assert config["sample_use_retrieve_futures"] is False
    assert config["sample_join_sampling_session"] is True
    assert config["custom_loss_server_side"] is False
    assert "proto_write_fwdbwd" not in config
    assert client.ask("client/config", sdk_version="0.24.1")["proto_write_fwdbwd"] is True
    dynamic = client.ask("client/dynamic_config", sdk_version="0.38.0")
    assert dynamic["refresh_interval_sec"] > 10
    assert dynamic["sample_cancel_enabled"] is True


def test_a_key_is_exchanged_for_a_token_though_nobody_needs_one(client):
    assert client.ask("client/config", sdk_version="0.38.0")["pjwt_auth_enabled"] is False
    token = client.ask("auth/token")["jwt"]
    assert token.startswith("eyJ")
    assert token.count(".") == 2
    assert client.post("client/config", json={}, headers={"X-API-Key": token}).status_code == 200


def test_login_and_logout_of_the_local_user(client):
    key = client.get("auth/apikey/me", headers={"X-API-Key": "tml-any"}).json()
    assert (key["key_id"], key["name"]) == (1, "local")
    assert key["details"] == {"org_details": {"name": "local"}, "user_details": {"email": "local"}}
    without = client.get("auth/apikey/me")
    assert without.status_code == 401
    assert without.json()["detail"].startswith("X-API-Key")
    assert client.delete("auth/apikey/me", headers={"X-API-Key": "tml-any"}).status_code == 200


def test_metrics_count_requests_by_route(client, engine):
    client.get("samplers/a")
    client.get("samplers/b")
    text = client.get("metrics").text
    assert 'tx_http_requests_total{route="/samplers/{sampler_id}",status="404"} 2' in text
    assert "tx_engine_ready 1" in text
    assert "tx_sequences_unfinished 0" in text
