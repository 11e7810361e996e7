"""Session routes: create once, heartbeat, finish, list, search, put into projects."""

from __future__ import annotations

import pytest
from sqlmodel import select
from tinker.types import SessionSearchRequest, SessionSearchResponse

from tests.tinker.conftest import Client
from tx.tinker.db import AuditEntry, now, open_database, reading
from tx.tinker.service import Service
from tx.tinker.sessions import EXPIRED_AFTER_S


def test_c11_a_retried_creation_gives_the_same_session(client):
    headers = {"x-idempotency-key": "stainless-1"}
    first, again = (client.post("create_session", json={"tags": []}, headers=headers).json() for _ in range(2))
    assert first == again
    assert first["type"] == "create_session"
    assert "/" not in first["session_id"]
    other = client.post("create_session", json={}, headers={"x-idempotency-key": "stainless-2"}).json()
    assert other["session_id"] != first["session_id"]
    assert client.new_session() != client.new_session()


def test_a_session_is_described_and_listed(client, running):
    ask = {"tags": ["t"], "user_metadata": {"a": "b"}, "display_name": "dn", "project_id": "p", "sdk_version": "0.38.0"}
    session = client.ask("create_session", **ask, type="create_session")["session_id"]
    model = client.new_model(session)
    client.ask("create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="org/base")
    assert client.get(f"sessions/{session}").json() == {
        "training_run_ids": [model],
        "sampler_ids": [f"{session}:sample:0"],
        "user_metadata": {"a": "b"},
        "display_name": "dn",
    }
    newer = client.new_session()
    assert client.get("sessions").json() == {"sessions": [newer, session]}
    assert client.get("sessions?limit=1&offset=1").json() == {"sessions": [session]}
    assert client.get("sessions?limit=0").status_code == 422


def test_heartbeat_keeps_alive_until_the_finish(client):
    session = client.new_session()
    assert client.ask("session_heartbeat", session_id=session) == {"type": "session_heartbeat"}
    client.ask(f"sessions/{session}/finish", reason={"type": "success"}, detail="done")
    client.ask(f"sessions/{session}/finish", reason={"type": "errored"})
    assert client.service.sessions.get(session).finish_reason == "success", "the first finish wins"
    assert client.ask("session_heartbeat", 410, session_id=session)["detail"]
    client.ask("session_heartbeat", 404, session_id="nobody")


def test_a_finished_session_takes_no_more_requests(client, running):
    session = client.new_session()
    model = client.new_model(session)
    client.ask(f"sessions/{session}/finish", reason={"type": "success"})
    body = {"session_id": session, "base_model": "org/base"}
    refused = [
        client.ask("create_model", 400, model_seq_id=1, **body),
        client.ask("create_sampling_session", 400, sampling_session_seq_id=1, **body),
        client.ask("optim_step", 400, model_id=model, seq_id=1, adam_params={}),
    ]
    assert {reply["detail"].split(":")[0] for reply in refused} == {"session_id"}
    assert client.ask("get_info", model_id=model)["model_id"] == model, "it can still be read"


def test_finishing_a_session_cancels_its_samples_and_nobody_elses(client):
    session = client.new_session()
    mine, other = client.sample(client.new_sampler(session)), client.sample(client.new_sampler())
    create = client.ask("create_model", session_id=session, model_seq_id=0, base_model="org/base")
    client.ask(f"sessions/{session}/finish", reason={"type": "success"})
    failure = client.result(mine)
    assert (failure["category"], failure["error"]) == ("user", "Cancelled: its session was finished.")
    for future in (other, create):
        assert client.service.jobs.get(int(future["request_id"])).status == "pending"


def test_sessions_are_searched_and_page(client):
    made = [client.ask("create_session", display_name=f"run {number}")["session_id"] for number in range(3)]
    request = SessionSearchRequest(display_name="RUN", limit=2)
    first = client.post("sessions/search", json=request.model_dump(mode="json", exclude_none=True)).json()
    page = SessionSearchResponse.model_validate(first)
    assert [session.session_id for session in page.sessions] == [made[2], made[1]]
    assert {session.status.type for session in page.sessions} == {"active"}
    request = request.model_copy(update={"cursor": page.next_cursor})
    last = client.post("sessions/search", json=request.model_dump(mode="json", exclude_none=True)).json()
    assert [session["session_id"] for session in last["sessions"]] == [made[0]]
    assert "next_cursor" not in last
    assert len(client.ask("sessions/search")["sessions"]) == 3, "nothing given restricts nothing"


def test_a_search_goes_by_the_services_clock(config, engine):
    clock = [now()]
    clocks = {"clock": lambda: clock[0], "steady": lambda: clock[0]}
    service = Service(config, open_database(config.resolved_database_url), **clocks)

    def status() -> str | None:
        (session,) = client.ask("sessions/search")["sessions"]
        return session.get("status", {}).get("type")

    with Client(service) as client:
        session = client.new_session()
        assert status() == "active"
        clock[0] += EXPIRED_AFTER_S + 1
        assert status() == "cancelled"
        client.ask("session_heartbeat", session_id=session)
        assert status() == "active"
        clock[0] += EXPIRED_AFTER_S + 1
        restarted = Service(config, open_database(config.resolved_database_url), **clocks)
        with Client(restarted) as client:
            assert status() is None, "it could not have been heard"
        restarted.close()
    service.close()


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"display_name": ""}, "display_name"),
        ({"display_name": "a\0"}, "display_name"),
        ({"user_metadata": {"a": 1}}, "user_metadata.a"),
        ({"project_ids": "p"}, "project_ids"),
        ({"owner": {"type": "nobody"}}, "owner"),
        ({"owner": {"type": "user"}}, "owner.user.owner_urns"),
        ({"owner": {"type": "user", "owner_urns": ["u"] * 11}}, "owner.user.owner_urns"),
        ({"statuses": []}, "statuses"),
        ({"statuses": [{"type": "lost"}]}, "statuses.0"),
        ({"statuses": [{"type": "client_finished", "reasons": ["tired"]}]}, "statuses.0.client_finished.reasons.0"),
        ({"cursor": {"last_session_id": "s"}}, "cursor.last_created_at"),
        ({"cursor": {"last_session_id": "s", "last_created_at": "2026-01-01T00:00:00"}}, "cursor.last_created_at"),
        ({"order": "asc"}, "order"),
    ],
)
def test_malformed_searches_are_400_and_name_the_field(client, body, names):
    assert client.ask("sessions/search", 400, **body)["detail"].split(":")[0] == names


def test_a_session_goes_into_a_project_and_to_another_but_never_out(client):
    session = client.new_session()
    url = f"sessions/{session}/project"

    def project() -> str:
        return client.ask("sessions/search", session_id=session)["sessions"][0]["project_id"]

    assert project() == ""
    for project_id in ("p", "p", "q"):
        assert client.put(url, json={"project_id": project_id}).status_code == 200
        assert project() == project_id
    for body in ({}, {"project_id": None}, {"project_id": ""}, {"project_id": 5}):
        refused = client.put(url, json=body)
        assert refused.status_code == 400
        assert refused.json()["detail"].startswith("project_id: ")
    assert "not out of the one" in client.put(url, json={"project_id": None}).json()["detail"]
    assert project() == "q"
    assert client.put("sessions/nobody/project", json={"project_id": "p"}).status_code == 404
    with reading(client.service.db) as db:
        entries = db.exec(select(AuditEntry).order_by(AuditEntry.id)).all()
    assert [(entry.category, entry.event, entry.details) for entry in entries] == [
        ("projects", "session.assign_project", {"session_id": session, "project_id": "p", "previous": None}),
        ("projects", "session.assign_project", {"session_id": session, "project_id": "q", "previous": "p"}),
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("create_session", {"tags": "x"}),
        ("create_session", {"user_metadata": {"a": 1}}),
        ("create_session", {"display_name": "a\0b"}),
        ("session_heartbeat", {}),
        ("sessions/x/finish", {"reason": {"type": "tired"}}),
        ("sessions/x/finish", {}),
        ("create_model", {"session_id": "", "model_seq_id": 0, "base_model": "m"}),
        ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 0}}),
        ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": {"alpha": 1}}),
    ],
)
def test_malformed_requests_are_400(client, path, body):
    assert client.ask(path, 400, **body)["detail"]


def test_a_model_for_nobody_is_404(client):
    client.ask("create_model", 404, session_id="nobody", model_seq_id=0, base_model="org/base")
