"""Usage, audit log, telemetry and traces over HTTP."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from tx.tinker import audit
from tx.tinker.config import TxConfig
from tx.tinker.db import AuditEntry, Job, now, writing

PRICES = {"price_training": 10.0, "price_prefill": 2.0, "price_sample": 4.0, "price_storage": 5.0}


@pytest.fixture
def config(tmp_path):
    return TxConfig(base_model="org/base", data_dir=tmp_path, database_url=f"sqlite:///{tmp_path / 'tx.db'}", **PRICES)


def window(before: int = 1, after: int = 1) -> dict[str, str]:
    """Some hours before and after the current one, as the SDK writes them."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    ends = {"starting_on": hour - timedelta(hours=before), "ending_before": hour + timedelta(hours=after)}
    return {key: value.isoformat().replace("+00:00", "Z") for key, value in ends.items()}


def usage(client, **params) -> dict:
    reply = client.get("billing/usage/events", params=params or window())
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_usage_of_real_requests_with_their_costs(client, running):
    session = client.ask("create_session", tags=[], user_metadata={"team": "a"})["session_id"]
    model = client.new_model(session)
    client.result(client.ask("save_weights", model_id=model, path="a", seq_id=1))
    client.result(client.sample(client.new_sampler(session)))
    answer = usage(client)
    assert answer["sessions"] == {session: {"user_metadata": {"team": "a"}}}
    events = {event["event_info"]["type"]: event for event in answer["data"]}
    sampled = events["sampling_sample"]
    assert sampled["event_info"] == {"type": "sampling_sample", "token_count": 2}
    prompts = [event["event_info"] for event in answer["data"] if event["event_info"]["type"] == "sampling_prefill"]
    assert [(prompt["cached"], prompt["token_count"]) for prompt in prompts] == [(False, 2), (True, 1)]
    assert (sampled["session_id"], sampled["base_model"]) == (session, "org/alias")
    assert sampled["estimated_cost_usd"] == pytest.approx(2 * 4.0 / 1e6)
    assert sampled["effective_rate_usd_per_million_tokens"] == 4.0
    assert events["checkpoint"]["event_info"] == {"type": "checkpoint", "count": 1}
    assert "estimated_cost_usd" not in events["checkpoint"]
    assert events["storage"]["effective_rate_usd_per_gigabyte_month"] == 5.0
    assert "session_id" not in events["storage"]


def test_a_window_without_usage_is_empty(client):
    assert usage(client) == {"data": [], "sessions": {}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"starting_on": "yesterday"}, "starting_on"),
        ({"starting_on": "2026-01-01T00:30:00Z"}, "starting_on"),
        ({"starting_on": "2026-01-01T00:00:00+05:30"}, "starting_on"),
        ({"starting_on": "9999-12-31T23:00:00-05:00"}, "starting_on"),
        ({"starting_on": "2999-01-01T00:00:00Z"}, "starting_on"),
        ({"ending_before": ""}, "ending_before"),
        (window(0, 0), "ending_before"),
        (window(14 * 24, 1), "ending_before"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_by_name(client, change, field):
    reply = client.get("billing/usage/events", params=window() | change)
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith(field)


def test_a_window_may_be_fourteen_days_long_and_its_zone_any(client):
    usage(client, **window(14 * 24 - 1, 1))
    usage(client, starting_on="2026-01-01T05:30:00+05:30", ending_before="2026-01-01T02:00:00")
    assert client.get("billing/usage/events").status_code == 422


def test_checkpoint_storage_by_project(client, running):
    reply = client.ask("create_session", tags=[], user_metadata={}, project_id="pj")
    model = client.new_model(reply["session_id"])
    client.result(client.ask("save_weights", model_id=model, path="a", seq_id=1))
    stored = client.get("billing/usage/checkpoints/current").json()
    assert stored["effective_rate_usd_per_gigabyte_month"] == 5.0
    (one,) = stored["data"]
    assert (one["project_id"], one["checkpoint_count"], one["size_bytes"]) == ("pj", 1, 10)
    assert one["estimated_monthly_cost_usd"] == pytest.approx(10 / 1e9 * 5)
    assert client.get("billing/usage/checkpoints/current?project_id=pj").json() == stored
    assert client.get("billing/usage/checkpoints/current?project_id=x").json()["data"] == []


def add_entries(client, *entries: AuditEntry) -> None:
    with writing(client.service.db) as session:
        session.add_all(entries)


def at(day: str, entry: AuditEntry) -> AuditEntry:
    entry.at = datetime.fromisoformat(day).timestamp()
    return entry


def entries(client, **params) -> list[dict]:
    reply = client.get("audit", params=params)
    assert reply.status_code == 200, reply.text
    return reply.json()["entries"]


def test_the_audit_log_is_a_days_entries_in_order(client):
    about = {"model_id": "s:train:0", "tinker_path": "tinker://s:train:0/weights/a"}
    add_entries(
        client,
        at("2026-07-13T23:59:59.999+00:00", audit.entry("checkpoints", "late")),
        at("2026-07-13T00:00:00+00:00", audit.entry("checkpoints", "checkpoint.publish", **about, public=True)),
        at("2026-07-13T12:00:00+00:00", audit.entry("projects", "project.set_owner")),
        at("2026-07-12T23:59:59.999+00:00", audit.entry("checkpoints", "before")),
        at("2026-07-14T00:00:00+00:00", audit.entry("checkpoints", "after")),
    )
    found = entries(client, day="2026-07-13")
    assert [entry["event"] for entry in found] == ["checkpoint_publish", "project_set_owner", "late"]
    assert (
        found[0]
        == {
            "timestamp": "2026-07-13T00:00:00Z",
            "event": "checkpoint_publish",
            "event_details": {"actor": "local", "public": True} | about,
        }
        | about
    )
    by_type = {kind: len(entries(client, day="2026-07-13", event_type=kind)) for kind in ("all", "projects", "teams")}
    assert by_type == {"all": 3, "projects": 1, "teams": 0}


def test_the_audit_log_is_todays_by_default_and_bounded(client, monkeypatch):
    monkeypatch.setattr("tx.tinker.routes.admin.MAX_AUDIT_ENTRIES", 3)
    assert entries(client) == []
    add_entries(client, *(audit.entry("checkpoints", f"e{n}") for n in range(5)))
    assert [entry["event"] for entry in entries(client)] == ["e2", "e3", "e4"], "the newest"


@pytest.mark.parametrize("query", ["day=tomorrow", "day=2026-02-30", "day=1767225600", "day=", "event_type=models"])
def test_bad_audit_queries_are_refused_by_name(client, query):
    reply = client.get(f"audit?{query}")
    assert reply.status_code in (400, 422)
    assert reply.json()["detail"].startswith(query.partition("=")[0])


def test_telemetry_can_be_read_and_counted_and_crashes_are_logged(client, caplog):
    crash = {
        "event": "UNHANDLED_EXCEPTION",
        "error_type": "ValueError",
        "error_message": "x" * 9000,
        "severity": "ERROR",
    }
    with caplog.at_level(logging.WARNING):
        for session in ("s", "sessionless-1"):
            assert client.ask("telemetry", events=[{"event": "SESSION_START"}, crash, 5], session_id=session) == {
                "status": "accepted"
            }
    logged = [record.getMessage() for record in caplog.records if "ValueError" in record.getMessage()]
    assert len(logged) == 2
    assert max(map(len, logged)) < 700
    events = client.get("telemetry", params={"session_id": "sessionless-1"}).json()["events"]
    assert [event["event"]["event"] for event in events] == ["UNHANDLED_EXCEPTION", "SESSION_START"]
    assert (events[0]["session_id"], events[0]["severity"]) == ("sessionless-1", "ERROR")
    assert len(client.get("telemetry").json()["events"]) == 4
    assert len(client.get("telemetry?limit=1").json()["events"]) == 1
    metrics = client.get("metrics").text
    assert 'tx_telemetry_events_total{event="UNHANDLED_EXCEPTION",severity="ERROR"} 2' in metrics
    assert 'tx_telemetry_events_total{event="SESSION_START",severity="INFO"} 2' in metrics
    assert "tx_telemetry_events_dropped_total 2" in metrics


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"events": [{"error_type": {"a": 1}}], "session_id": []}'])
def test_no_telemetry_is_an_error(client, body):
    reply = client.post("telemetry", content=body)
    assert (reply.status_code, reply.json()) == (200, {"status": "accepted"})


@pytest.mark.parametrize(
    "value", ["1e999", "NaN", '"\\ud800"', '"\\u0000"', "[" * 400 + "]" * 400, "[" * 5000 + "]" * 5000, "9" * 100]
)
def test_odd_telemetry_can_be_read_again(client, value):
    sent = f'{{"session_id": "s\\ud800", "events": [{{"event_name": "odd", "value": {value}}}]}}'
    client.post("telemetry", content=sent.encode())
    reply = client.get("telemetry")
    assert reply.status_code == 200
    assert len(value) > 5000 or [event["event"]["event_name"] for event in reply.json()["events"]] == ["odd"]


def test_telemetry_is_accepted_when_the_database_is_not_there(client, monkeypatch):
    from sqlalchemy.exc import OperationalError

    def broken(*_: object) -> None:
        raise OperationalError("insert", {}, Exception("disk is full"))

    monkeypatch.setattr("tx.tinker.telemetry.keep", broken)
    assert client.ask("telemetry", events=[{"event": "GENERIC_EVENT"}], session_id="s") == {"status": "accepted"}


def test_a_trace_is_downloaded_from_where_the_client_found_the_server(client, running):
    session = client.new_session()
    client.new_model(session)
    client.result(client.sample(client.new_sampler(session)))
    export = client.get(f"sessions/{session}/trace_export", headers={"host": "tx.example:8123"}).json()
    assert export["status"] == "ready"
    assert export["url"].startswith(f"http://tx.example:8123/api/v1/files/{session}/trace?expires=")
    trace = client.get(export["url"])
    assert trace.headers["content-type"] == "application/json"
    begun = [event["name"] for event in json.loads(trace.text)["traceEvents"] if event["ph"] == "b"]
    assert begun == ["create_model", "queued", "running", "sample", "queued", "running"]


def test_an_unknown_session_has_no_trace(client):
    reply = client.get("sessions/nobody/trace_export")
    assert reply.status_code == 404
    assert reply.json()["detail"].startswith("session_id")


def test_a_trace_is_only_for_who_has_its_signed_address(client):
    session = client.new_session()
    url = client.get(f"sessions/{session}/trace_export").json()["url"]
    assert client.get(url).status_code == 200
    assert client.get(url.partition("?")[0]).status_code == 403
    assert client.get(url.replace(session, client.new_session())).status_code == 403


def test_usage_of_a_session_that_is_not_known_is_counted_all_the_same(client):
    with writing(client.service.db) as session:
        session.add(
            Job(
                kind="sample",
                session_id="gone",
                base_model="b",
                status="done",
                created_at=now(),
                finished_at=now(),
                tokens_out=5,
            )
        )
    answer = usage(client)
    assert [event["event_info"]["token_count"] for event in answer["data"]] == [5]
    assert answer["sessions"] == {}
