"""Writes in threads: under way until whoever drives them has taken what they ended with."""

from __future__ import annotations

import threading

import pytest

from tx.tinker.db import Job
from tx.tinker.jobs import Outcome
from tx.tinker.wire.paths import TinkerPath
from tx.tinker.writes import MAX_WRITES, NUM_THREADS, Writes, Writing

LIMIT_S = 60.0


def writing(name: str, write) -> Writing:
    path = TinkerPath("sess-a:train:0", "weights", name)
    return Writing(path, write, outcome=lambda size: Outcome(1, str(size).encode()), tidy=lambda: None)


def job(request_id: int) -> Job:
    return Job(request_id=request_id, session_id="sess-a", kind="save_weights", base_model="b")


def until_done(writes: Writes) -> None:
    """Wait for the threads themselves."""
    for _, _, future in writes._under_way.values():
        future.exception(LIMIT_S)


def test_a_write_is_under_way_until_its_end_is_taken():
    writes, go = Writes(), threading.Event()
    writes.begin(job(1), writing("slow", lambda: int(go.wait(LIMIT_S))))
    writes.begin(job(2), writing("full", lambda: 1 // 0))
    assert len(writes) == 2
    assert "tinker://sess-a:train:0/weights/slow" in writes
    assert "tinker://sess-a:train:0/weights/other" not in writes
    go.set()
    until_done(writes)
    assert len(writes) == 2
    (slow, slow_writing, slow_future), (full, _, full_future) = writes.ended()
    assert (slow.request_id, full.request_id) == (1, 2)
    assert slow_writing.outcome(slow_future.result()).result == b"1"
    with pytest.raises(ZeroDivisionError):
        full_future.result()
    assert not writes
    assert not list(writes.ended())


def test_a_slow_write_holds_up_no_other():
    writes, go = Writes(), threading.Event()
    writes.begin(job(1), writing("slow", lambda: int(go.wait(LIMIT_S))))
    writes.begin(job(2), writing("quick", lambda: 2))
    writes._under_way["tinker://sess-a:train:0/weights/quick"][2].exception(LIMIT_S)
    assert [ended.request_id for ended, _, _ in writes.ended()] == [2]
    assert len(writes) == 1
    go.set()


def test_so_many_at_a_time_and_each_to_a_place_of_its_own():
    writes, go = Writes(), threading.Event()
    for number in range(MAX_WRITES):
        assert not writes.are_full
        writes.begin(job(number), writing(f"ck{number}", lambda: int(go.wait(LIMIT_S))))
    assert writes.are_full
    with pytest.raises(AssertionError, match="ck0"):
        writes.begin(job(99), writing("ck0", lambda: 1))
    go.set()
    until_done(writes)
    assert len(list(writes.ended())) == MAX_WRITES
    assert not writes.are_full


def test_closing_waits_for_nobody():
    writes, go = Writes(), threading.Event()
    for number in range(MAX_WRITES):
        writes.begin(job(number), writing(f"ck{number}", lambda: int(go.wait(LIMIT_S))))
    writes.close()
    assert len(list(writes.ended())) >= MAX_WRITES - NUM_THREADS, "those that had not begun never will"
    go.set()
