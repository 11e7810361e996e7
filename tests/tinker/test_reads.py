"""Reads in threads: not there until they are, once each, and what failed them goes to who asked."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tx.tinker.reads import Reads, StillReading, when_read

LIMIT_S = 60.0


def until_done(reads: Reads, key: str) -> None:
    """Wait for the thread itself; then its state can be taken."""
    reads._futures[key].exception(LIMIT_S)


def test_a_state_is_there_when_its_thread_is_done_and_is_taken_once():
    reads, go = Reads(), threading.Event()
    states = iter(["first", "second"])

    def read() -> str:
        go.wait(LIMIT_S)
        return next(states)

    with pytest.raises(StillReading, match="ck"):
        reads.take("ck", read)
    with pytest.raises(StillReading):
        reads.take("ck", read)
    assert reads
    assert not reads.is_done("ck")
    go.set()
    until_done(reads, "ck")
    assert reads.is_done("ck")
    assert reads.take("ck", read) == "first"
    assert not reads
    with pytest.raises(StillReading):
        reads.take("ck", read)
    until_done(reads, "ck")
    assert reads.take("ck", read) == "second"


def test_a_slow_read_holds_up_no_other():
    reads, go = Reads(), threading.Event()
    with pytest.raises(StillReading):
        reads.take("slow", lambda: go.wait(LIMIT_S))
    with pytest.raises(StillReading):
        reads.take("quick", lambda: "state")
    until_done(reads, "quick")
    assert reads.take("quick", lambda: "state") == "state"
    assert not reads.is_done("slow")
    go.set()


def test_what_a_read_raises_is_raised_to_who_takes_it():
    reads = Reads()
    with pytest.raises(StillReading):
        reads.take("ck", lambda: 1 / 0)
    until_done(reads, "ck")
    with pytest.raises(ZeroDivisionError):
        reads.take("ck", lambda: 1 / 0)
    assert not reads


def test_what_nobody_takes_is_let_go_the_second_time():
    reads = Reads()
    with pytest.raises(StillReading):
        reads.take("ck", lambda: "state")
    until_done(reads, "ck")
    reads.drop_untaken()
    assert reads.is_done("ck")
    reads.drop_untaken()
    assert not reads


def test_a_rebuild_yields_while_it_waits():
    reads = Reads()
    waiting = when_read(partial(reads.take, "ck", lambda: "state"))
    next(waiting)
    until_done(reads, "ck")
    with pytest.raises(StopIteration) as stopped:
        next(waiting)
    assert stopped.value.value == "state"
