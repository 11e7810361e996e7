"""What the owner of a server asks of it, through the real SDK: usage, audit log, traces, telemetry, login, clones."""

from __future__ import annotations

import json
import pickle
import urllib.request
from datetime import UTC, date, datetime, timedelta

import httpx
import pytest
import tinker
from tinker import types
from tinker.cli.auth_api import TinkerAuthApi

from tests.support.server import BASE_MODEL, Server
from tx.tinker import audit
from tx.tinker.db import open_database, writing

PROMPT = types.ModelInput.from_ints(list(range(11, 51)))
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
WAIT_S = 120.0


@pytest.fixture(scope="module")
def admin(server: Server) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=server.url, api_key="tml-test")


@pytest.fixture(scope="module")
def session(server: Server):
    """A client that has trained, saved and sampled; with it its id and the cache hits that its samples reported."""
    with tinker.ServiceClient(base_url=server.url, user_metadata={"team": "usage"}) as service:
        training = service.create_lora_training_client(base_model=BASE_MODEL, rank=4).result(WAIT_S)
        tokens = list(range(8))
        inputs = {"target_tokens": tokens, "weights": [1.0] * 8}
        datum = types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)
        training.forward_backward([datum, datum], "cross_entropy").result(WAIT_S)
        training.forward([datum], "cross_entropy").result(WAIT_S)
        training.save_state("usage").result(WAIT_S)
        sampler = training.save_weights_and_get_sampling_client().result(WAIT_S)
        samples = [sampler.sample(PROMPT, 2, GREEDY) for _ in range(3)]
        hits = sum(sample.result(WAIT_S).prompt_cache_hit_tokens for sample in samples)
        yield training.get_info().model_id.partition(":")[0], hits


def usage(admin: tinker.AdminClient) -> types.BillingUsageResponse:
    """Of the hours around now."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result(WAIT_S)


def test_usage_is_what_the_client_did(admin, session):
    session_id, hits = session
    answer = usage(admin)
    counted: dict[str, int] = {}
    for event in answer.data:
        if event.session_id == session_id:
            assert event.base_model == BASE_MODEL
            assert event.bucket_end - event.bucket_start == timedelta(hours=1)
            info = event.event_info
            name = "cached" if getattr(info, "cached", False) else info.type
            count = info.count if isinstance(info, types.CheckpointBillingEvent) else info.token_count
            counted[name] = counted.get(name, 0) + count  # the hour may have changed meanwhile
    assert counted == {
        "training": 3 * 8,
        "sampling_prefill": 3 * PROMPT.length - hits,
        "cached": hits,
        "sampling_sample": 3 * 2 * 6,
        "checkpoint": 1,
    }
    assert answer.sessions[session_id].user_metadata == {"team": "usage"}
    assert any(isinstance(event.event_info, types.StorageBillingEvent) for event in answer.data)


def test_the_sdk_shows_why_a_window_is_refused(admin):
    with pytest.raises(tinker.BadRequestError, match=r"starting_on: .* a full UTC hour"):
        admin.get_billing_usage("2026-07-13T00:30:00Z", "2026-07-13T01:00:00Z").result(WAIT_S)


def test_checkpoint_storage_counts_what_was_saved(admin, session):
    storage = admin.get_current_checkpoint_storage_usage().result(WAIT_S)
    assert storage.effective_rate_usd_per_gigabyte_month == 0.0
    (item,) = [item for item in storage.data if item.project_id is None]
    assert item.checkpoint_count >= 1
    assert item.size_bytes > 10_000
    assert item.size_gigabytes == item.size_bytes / 1e9


def test_the_audit_log_tells_what_was_changed(server: Server, admin):
    db = open_database(f"sqlite:///{server.folder / 'tx.db'}")
    entry = audit.entry("checkpoints", "checkpoint.publish", tinker_path="tinker://s:train:0/weights/audited")
    entry.at = datetime(2026, 1, 15, 12, tzinfo=UTC).timestamp()
    with writing(db) as rows:
        rows.add(entry)
    db.dispose()
    (found,) = admin.get_audit_log("checkpoints", date(2026, 1, 15)).result(WAIT_S).entries
    assert (found.event, found.timestamp.hour) == ("checkpoint_publish", 12)
    assert found.event_details["actor"] == "local"
    assert found.tinker_path == "tinker://s:train:0/weights/audited"
    assert admin.get_audit_log("teams", date(2026, 1, 15)).result(WAIT_S).entries == []


def test_a_session_is_exported_as_a_trace(server: Server, session):
    rest = tinker.RestClient(base_url=server.url, api_key="tml-test")
    url = rest.export_session_trace(session[0]).result(WAIT_S)
    assert url.startswith(server.url)
    with urllib.request.urlopen(url, timeout=WAIT_S) as download:
        events = json.load(download)["traceEvents"]
    begun = [event["name"] for event in events if event["ph"] == "b"]
    assert begun.count("sample") == 3
    assert begun.count("forward_backward") == begun.count("forward") == begun.count("save_weights") == 1
    assert begun.count("running") == begun.count("queued") == 8


def reported(server: Server, **query: str) -> list[dict]:
    with server.client() as http:
        return http.get("/telemetry", params=query).json()["events"]


def test_clients_telemetry_can_be_read(server: Server, monkeypatch):
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    with tinker.ServiceClient(base_url=server.url, api_key="tml-telemetry") as client:
        session_id = client.holder.get_session_id()
    kinds = [report["event"]["event"] for report in reported(server, session_id=session_id)]
    assert "SESSION_START" in kinds
    rest = tinker.RestClient(base_url=server.url, api_key="tml-telemetry")
    with pytest.raises(tinker.NotFoundError):
        rest.get_training_run("nobody").result(WAIT_S)
    reports = [report for report in reported(server) if report["session_id"].startswith("sessionless-")]
    assert any("nobody" in json.dumps(report["event"]) for report in reports)


def test_login_shows_the_local_user_and_logout_goes_well(server: Server):
    with httpx.Client(timeout=WAIT_S) as http:
        api = TinkerAuthApi(http, base_url=server.url)
        key = api.get_self_api_key("tml-any")
        assert (key.name, key.details.user_details.email) == ("local", "local")
        api.delete_self_api_key("tml-any")


def test_copies_of_a_sampling_client_never_collide(service: tinker.ServiceClient):
    sampler = service.create_sampling_client(base_model=BASE_MODEL).result(WAIT_S)
    expected = list(sampler.sample(PROMPT, 1, GREEDY).result(WAIT_S).sequences[0].tokens)
    handle = pickle.dumps(sampler)
    copies = [pickle.loads(handle) for _ in range(3)]
    samples = [copy.sample(PROMPT, 1, GREEDY) for copy in copies]
    assert [list(sample.result(WAIT_S).sequences[0].tokens) for sample in samples] == [expected] * 3
    assert sorted(copy._cloned_sampler_id for copy in copies) == [1, 2, 3]
