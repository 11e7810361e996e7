"""Session routes: create once, heartbeat, finish, list."""

from __future__ import annotations

import pytest


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
