"""retrieve_future: hold, wake, try again, never lose an answer."""

from __future__ import annotations

import threading
import time

import pytest

from tx.tinker.db import now
from tx.tinker.jobs import Outcome
from tx.tinker.routes import futures


@pytest.fixture
def pending(client):
    """A request that nobody answers."""
    session = client.new_session()
    ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/base"}
    sampler = client.ask("create_sampling_session", **ask)["sampling_session_id"]
    return client.ask("asample", sampling_session_id=sampler, seq_id=0, prompt={"chunks": []})


def test_a_pending_future_says_try_again_with_408(client, pending, engine, monkeypatch):
    monkeypatch.setattr(futures, "HOLD_S", 0.05)
    reply = client.post("retrieve_future", json={"request_id": pending["request_id"]})
    assert reply.status_code == 408
    assert reply.json() == {"type": "try_again", "request_id": pending["request_id"], "queue_state": "active"}
    engine.beat("recovering")
    state = client.post("retrieve_future", json={"request_id": pending["request_id"]}).json()
    assert state["queue_state"] == "paused_capacity"
    assert "org/base" in state["queue_state_reason"]


def test_a_held_poll_wakes_with_the_commit(client, pending):
    """Far below the hold time, or the wake-up does not work."""
    replies = []
    started = time.monotonic()
    thread = threading.Thread(target=lambda: replies.append(client.result(pending)))
    thread.start()
    jobs = client.service.jobs
    while not client.service.watcher._waiting:
        time.sleep(0.001)
    jobs.commit([Outcome(int(pending["request_id"]), b'{"metrics": null}')])
    thread.join()
    assert replies == [{"metrics": None}]
    assert time.monotonic() - started < futures.HOLD_S / 2


def test_an_answer_can_be_fetched_again(client, pending):
    client.service.jobs.commit([Outcome(int(pending["request_id"]), b'{"a": 1}')])
    assert [client.result(pending) for _ in range(3)] == [{"a": 1}] * 3


def test_a_pruned_answer_is_gone_and_says_so(client, pending):
    client.service.jobs.commit([Outcome(int(pending["request_id"]), b'{"a": 1}')])
    client.service.jobs.prune(now() + 1)
    reply = client.post("retrieve_future", json={"request_id": pending["request_id"]})
    assert reply.status_code == 410
    assert "pruned" in reply.json()["detail"]


@pytest.mark.parametrize("request_id", ["999999", "nobody", "-1", "", "9" * 30, "1.0", "٣"])
def test_unknown_futures_are_404(client, request_id):
    reply = client.post("retrieve_future", json={"request_id": request_id})
    assert reply.status_code == 404
    assert reply.json()["detail"].startswith("request_id")


def test_a_request_id_is_text(client):
    assert client.ask("retrieve_future", 400, request_id=1)["detail"].startswith("request_id")


def test_cancel_before_the_start_fails_the_future(client, pending):
    client.ask("cancel_future", request_id=pending["request_id"])
    assert client.result(pending)["category"] == "user"
    client.ask("cancel_future", status=404, request_id="999")
