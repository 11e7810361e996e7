"""retrieve_future and retrieve_futures: hold, wake, try again, never lose an answer; why one waits; cancelling."""

from __future__ import annotations

import json
import threading
import time

import pytest

from tx.tinker import service as service_module
from tx.tinker.db import now
from tx.tinker.jobs import Outcome
from tx.tinker.pruning import prune
from tx.tinker.service import HOLD_S

CANCELLED = "Cancelled by the client."


ANSWER = {"metrics": {"grad_norm:mean": 1.0}, "type": "optim_step"}


@pytest.fixture
def sampler(client):
    return client.new_sampler()


@pytest.fixture
def pending(client, sampler):
    """A request that nobody answers."""
    return client.sample(sampler)


def test_a_pending_future_says_try_again_with_408(client, pending, engine):
    client.service.hold_s = 0.05
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
    jobs.commit([Outcome(int(pending["request_id"]), json.dumps(ANSWER).encode())])
    thread.join()
    assert replies == [ANSWER]
    assert time.monotonic() - started < HOLD_S / 2


def test_an_answer_can_be_fetched_again(client, pending):
    client.service.jobs.commit([Outcome(int(pending["request_id"]), json.dumps(ANSWER).encode())])
    assert [client.result(pending) for _ in range(3)] == [ANSWER] * 3


def test_a_pruned_answer_is_gone_and_says_so(client, pending):
    client.service.jobs.commit([Outcome(int(pending["request_id"]), json.dumps(ANSWER).encode())])
    prune(client.service.db, now() + 1)
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


# ---- why it waits ----


def state_of(client, future) -> dict:
    client.service.hold_s = 0.0
    reply = client.post("retrieve_future", json={"request_id": future["request_id"]})
    assert reply.status_code == 408
    return {key: value for key, value in reply.json().items() if key.startswith("queue_state")}


def test_a_sample_that_waits_for_slots_is_told_how_many_do(client, sampler, engine):
    first, second = client.sample(sampler, 0, num_samples=2), client.sample(sampler, 1, num_samples=5)
    waits = {"queue_state": "paused_capacity", "queue_state_reason": "5 sequences wait for 2 decode slots."}
    assert state_of(client, first) == waits
    client.service.jobs.claim("org/base", 9)
    client.service.jobs.start([int(first["request_id"])])
    assert state_of(client, first) == {"queue_state": "active"}
    assert state_of(client, second) == waits


def test_training_does_not_wait_for_slots(client, sampler, engine):
    client.sample(sampler, num_samples=16)
    session = client.new_session()
    create = client.ask("create_model", session_id=session, model_seq_id=0, base_model="org/base")
    assert state_of(client, create) == {"queue_state": "active"}


@pytest.mark.parametrize(
    ("beat", "reason"),
    [
        ({"state": "starting", "detail": "reading weights: 40 %"}, "is starting: reading weights: 40 %."),
        ({"state": "recovering"}, "is recovering."),
        ({"state": "ready", "age_s": 90.0}, "has been silent for 90 s."),
    ],
)
def test_an_engine_that_is_not_ready_is_the_reason(client, pending, engine, beat, reason):
    engine.beat(**beat)
    assert state_of(client, pending) == {
        "queue_state": "paused_capacity",
        "queue_state_reason": f"The engine of org/base {reason}",
    }


def test_many_polls_count_the_queue_once_a_second(client, sampler, engine, monkeypatch):
    waiting = [client.sample(sampler, seq) for seq in range(6)]
    counts = []
    count = client.service.jobs.unfinished_sequences
    monkeypatch.setattr(client.service.jobs, "unfinished_sequences", lambda name: counts.append(name) or count(name))
    clock = [100.0]
    monkeypatch.setattr(service_module.time, "monotonic", lambda: clock[0])
    states = [client.service.queue_state(client.service.jobs.get(int(one["request_id"]))) for one in waiting * 5]
    assert len(counts) == 1
    assert set(states) == {("paused_capacity", "4 sequences wait for 2 decode slots.")}
    clock[0] += 1.1
    client.service.num_sequences("org/base")
    assert len(counts) == 2


# ---- cancelling ----


def test_cancelling_fails_a_sample_that_waits_or_runs(client, sampler):
    waiting, running = client.sample(sampler, 0), client.sample(sampler, 1)
    client.service.jobs.cancel(int(waiting["request_id"]))
    client.service.jobs.claim("org/base", 9)
    for future in (waiting, running, running):
        assert client.ask("cancel_future", request_id=future["request_id"]) == {}
        failure = {"error": CANCELLED, "category": "user", "request_id": future["request_id"]}
        assert client.result(future) == failure
    assert client.service.jobs.take_cancelled("org/base") == [int(running["request_id"])]
    client.ask("cancel_future", status=404, request_id="999")


def test_cancelling_what_is_done_changes_nothing(client, pending):
    client.service.jobs.commit([Outcome(int(pending["request_id"]), json.dumps(ANSWER).encode())])
    client.ask("cancel_future", request_id=pending["request_id"])
    assert client.result(pending) == ANSWER


def test_a_held_poll_learns_of_the_cancellation(client, pending):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(client.result(pending)))
    thread.start()
    while not client.service.watcher._waiting:
        time.sleep(0.001)
    client.ask("cancel_future", request_id=pending["request_id"])
    thread.join()
    assert [reply["error"] for reply in replies] == [CANCELLED]


# ---- retrieve_futures ----


def poll(client, sampler, cursor=0, clone=0, timeout: float | None = 0.0, **more) -> dict:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return client.ask("retrieve_futures", target=target, prev_cursor=cursor, timeout=timeout, **more)


def commit(client, future, result=b"{}") -> None:
    client.service.jobs.commit([Outcome(int(future["request_id"]), result)])


def test_completions_come_in_order_and_once(client, sampler):
    one, two, three = (client.sample(sampler, seq) for seq in range(3))
    assert poll(client, sampler) == {"completions": [], "cursor": 0}
    commit(client, two, b"12345")
    client.service.jobs.fail(int(one["request_id"]), "no", "user")
    reply = poll(client, sampler)
    assert reply["completions"] == [
        {"state": "finished", "request_id": two["request_id"], "response_payload_uncompressed_size": 5},
        {"state": "failed", "request_id": one["request_id"]},
    ]
    assert poll(client, sampler, reply["cursor"]) == {"completions": [], "cursor": reply["cursor"]}
    commit(client, three)
    ids = [item["request_id"] for item in poll(client, sampler, reply["cursor"])["completions"]]
    assert ids == [three["request_id"]]
    again = poll(client, sampler, 0, retrieved_request_ids=[one["request_id"], two["request_id"]])
    assert [item["request_id"] for item in again["completions"]] == [three["request_id"]], "a poll can be repeated"


def test_each_clone_hears_of_its_own_samples(client, sampler):
    original, clone = client.sample(sampler, 7), client.sample(sampler, 827701264 * 10**9 + 3)
    other = client.sample(client.new_sampler(), 7)
    for future in (clone, original, other):
        commit(client, future)
    mine = poll(client, sampler)
    assert [item["request_id"] for item in mine["completions"]] == [original["request_id"]]
    assert mine["cursor"] == 2, "what others finished need not be looked at again"
    (item,) = poll(client, sampler, clone=827701264)["completions"]
    assert item["request_id"] == clone["request_id"]
    assert poll(client, sampler, clone=5) == {"completions": [], "cursor": 2}


def test_more_completions_than_one_page(client, sampler, monkeypatch):
    futures_ = [client.sample(sampler, seq + (10**9 if seq < 4 else 0)) for seq in range(6)]
    for future in futures_:
        commit(client, future)
    page = client.service.jobs.completions
    monkeypatch.setattr(client.service.jobs, "completions", lambda name, after: page(name, after, limit=2))
    ids = [item["request_id"] for item in poll(client, sampler)["completions"]]
    assert ids == [future["request_id"] for future in futures_[4:]], "pages of other clones are passed over"


def test_a_held_poll_for_completions_wakes_with_the_first(client, sampler):
    """Far below the hold time, or the wake-up does not work; other clones' completions don't end it."""
    mine, other = client.sample(sampler, 0), client.sample(sampler, 10**9)
    replies = []
    started = time.monotonic()
    thread = threading.Thread(target=lambda: replies.append(poll(client, sampler, timeout=None)))
    thread.start()
    while not client.service.watcher._waiting:
        time.sleep(0.001)
    commit(client, other)
    while (sampler, 1) not in client.service.watcher._waiting and thread.is_alive():
        time.sleep(0.001)
    assert replies == []
    commit(client, mine)
    thread.join()
    assert [item["request_id"] for item in replies[0]["completions"]] == [mine["request_id"]]
    assert replies[0]["cursor"] == 2
    assert time.monotonic() - started < HOLD_S / 2


def test_polls_for_completions_end_by_themselves(client, sampler):
    client.service.hold_s = 0.05
    assert poll(client, sampler, cursor=4, timeout=600.0) == {"completions": [], "cursor": 4}
    assert poll(client, sampler, timeout=None) == {"completions": [], "cursor": 0}


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"target": {"type": "sampling_session", "sampling_session_id": "nobody"}}, 404, "sampling_session_id"),
        ({"target": {"type": "model", "sampling_session_id": "s"}}, 400, "target.type"),
        ({"target": {"type": "sampling_session"}}, 400, "target.sampling_session_id"),
        ({"prev_cursor": -1}, 400, "prev_cursor"),
        ({"prev_cursor": 2**63}, 400, "prev_cursor"),
        ({"timeout": -1}, 400, "timeout"),
        ({"retrieved_request_ids": [7]}, 400, "retrieved_request_ids.0"),
    ],
)
def test_malformed_polls_name_the_field(client, sampler, change, status, named):
    body = {"target": {"type": "sampling_session", "sampling_session_id": sampler}} | change
    assert client.ask("retrieve_futures", status, **body)["detail"].split(":")[0] == named
