"""A session's trace: the spans of its jobs, in Chrome's format."""

from __future__ import annotations

import json

import pytest

from tx.tinker import traces
from tx.tinker.db import Job, now, writing
from tx.tinker.traces import chrome_trace


def job(kind: str, created: float, session: str = "s", **values) -> Job:
    return Job(kind=kind, session_id=session, base_model="b", status="done", created_at=created, **values)


def trace(db, session: str = "s") -> list[dict]:
    text = "".join(chrome_trace(db, session))
    assert text.startswith('{"traceEvents":['), "viewers tell the format by it"
    read = json.loads(text)
    assert read["otherData"] == {"session_id": session}
    return read["traceEvents"]


def spans(events: list[dict]) -> list[tuple]:
    """(process, kind, request, name, begin, end), outer spans before inner ones; every begin has its end."""
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    open_: dict[tuple, list[dict]] = {}
    found = []
    for event in events:
        if event["ph"] == "M":
            continue
        stack = open_.setdefault((event["cat"], event["id"]), [])
        if event["ph"] == "b":
            stack.append(event)
            continue
        assert event["ph"] == "e"
        begin = stack.pop()
        assert begin["name"] == event["name"], "spans of a job must nest"
        found.append((names[event["pid"]], event["cat"], event["id"], event["name"], begin["ts"], event["ts"]))
    assert not any(open_.values())
    return found


def test_each_job_is_queued_then_runs_in_its_models_or_samplers_process(db):
    trained = job(
        "forward_backward", 100, model_id="s:train:0", seq_id=4, tokens_in=7, claimed_at=101, finished_at=103.5
    )
    sampled = job("sample", 101, sampler_id="s:sample:0", claimed_at=101.5, started_at=102, finished_at=104)
    other = job("sample", 101, "elsewhere", sampler_id="x", claimed_at=102, finished_at=103)
    with writing(db) as session:
        session.add_all([trained, sampled, other])
        session.flush()
        first, second = trained.request_id, sampled.request_id
    events = trace(db)
    us = 1_000_000
    assert sorted(spans(events)) == sorted(
        [
            ("s:train:0", "forward_backward", first, "queued", 100 * us, 101 * us),
            ("s:train:0", "forward_backward", first, "running", 101 * us, 103.5 * us),
            ("s:train:0", "forward_backward", first, "forward_backward", 100 * us, 103.5 * us),
            ("s:sample:0", "sample", second, "queued", 101 * us, 102 * us),
            ("s:sample:0", "sample", second, "running", 102 * us, 104 * us),
            ("s:sample:0", "sample", second, "sample", 101 * us, 104 * us),
        ]
    )
    (told,) = [event["args"] for event in events if event["name"] == "forward_backward" and event["ph"] == "b"]
    assert told == {"request_id": str(first), "seq_id": 4, "status": "done", "tokens_in": 7}


def test_what_is_not_over_lasts_until_now_and_what_never_ran_was_only_queued(db):
    waiting = job("sample", 100, sampler_id="a", num_sequences=2)
    running = job("sample", 100, sampler_id="b", claimed_at=101)
    refused = job("optim_step", 100, model_id="c", finished_at=100, error="no")
    with writing(db) as session:
        session.add_all([waiting, running, refused])
    before = now() * 1e6
    by_owner: dict[str, list[tuple]] = {}
    for owner, _, _, name, begin, end in spans(trace(db)):
        by_owner.setdefault(owner, []).append((name, begin, end))
    assert [name for name, _, _ in by_owner["a"]] == ["queued", "sample"]
    assert [name for name, _, _ in by_owner["b"]] == ["queued", "running", "sample"]
    assert by_owner["c"] == [("queued", 100e6, 100e6), ("optim_step", 100e6, 100e6)]
    assert all(before - 1 <= end <= now() * 1e6 + 1 for end in (by_owner["a"][0][2], by_owner["b"][1][2]))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_a_trace_is_whole_however_many_pages_it_takes(db, monkeypatch, count):
    monkeypatch.setattr(traces, "_PAGE", 3)
    with writing(db) as session:
        session.add_all([job("sample", n, sampler_id="a", claimed_at=n, finished_at=n + 1) for n in range(count)])
    assert len(spans(trace(db))) == 3 * count
