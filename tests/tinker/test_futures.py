"""Grouped appends and woken futures."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import OperationalError

from tx.errors import InvalidInput
from tx.tinker.db import Sampler, now, open_database
from tx.tinker.futures import Appender, Watcher
from tx.tinker.jobs import JobTable, NewJob, Outcome
from tx.tinker.notify import ChangeSignal


@pytest.fixture
def jobs(database_url):
    db, signal = open_database(database_url), ChangeSignal(database_url)
    yield JobTable(db, signal)
    signal.close()
    db.dispose()


@pytest.fixture
def appender(jobs):
    made = Appender(jobs)
    yield made
    made.close()


@pytest.fixture
def watcher(jobs, database_url):
    signal = ChangeSignal(database_url)
    made = Watcher(jobs, signal)
    yield made
    made.close()
    signal.close()


def new(seq: int | None, fingerprint: str = "") -> NewJob:
    return NewJob(
        kind="forward_backward", base_model="m", payload=b"p", model_id="a", seq_id=seq, fingerprint=fingerprint
    )


def test_concurrent_appends_share_transactions(jobs, appender, monkeypatch):
    sizes = []
    append = jobs.append
    monkeypatch.setattr(jobs, "append", lambda group: (sizes.append(len(group)), append(group))[1])

    async def many() -> list[int]:
        return await asyncio.gather(*(appender.append(new(seq)) for seq in range(200)))

    ids = asyncio.run(many())
    assert len(set(ids)) == 200
    assert sum(sizes) == 200
    assert len(sizes) < 50


def test_a_refused_append_fails_alone(appender):
    async def some() -> list:
        await appender.append(new(1, "x"))
        return await asyncio.gather(*(appender.append(new(*a)) for a in ((1, "y"), (2,))), return_exceptions=True)

    refused, good = asyncio.run(some())
    assert isinstance(refused, InvalidInput)
    assert isinstance(good, int)


def test_a_database_error_reaches_the_caller_and_the_thread_lives_on(jobs, appender, monkeypatch):
    append = jobs.append
    monkeypatch.setattr(jobs, "append", lambda group: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(appender.append(new(1)))
    monkeypatch.setattr(jobs, "append", append)
    assert asyncio.run(appender.append(new(1))) > 0


def test_500_waiters_are_woken_by_one_commit_each(jobs, watcher):
    """They hold neither a connection nor a thread while they wait."""
    ids = [answer.request_id for answer in jobs.append([new(seq) for seq in range(500)])]

    async def wait_for_all() -> list[bool]:
        waits = [asyncio.create_task(watcher.wait(request_id, 60, lambda: False)) for request_id in ids]
        while len(watcher._waiting) < 500:
            await asyncio.sleep(0.005)
        for half in (ids[:250], ids[250:]):
            await asyncio.to_thread(jobs.commit, [Outcome(request_id, b"") for request_id in half])
        return await asyncio.gather(*waits)

    assert all(asyncio.run(wait_for_all()))
    assert not watcher._waiting


def test_a_job_that_finished_before_the_wait_is_not_missed(jobs, watcher):
    (answer,) = jobs.append([new(1)])
    jobs.commit([Outcome(answer.request_id, b"")])

    def check() -> bool:
        return bool(jobs.finished_ids([answer.request_id]))

    assert asyncio.run(watcher.wait(answer.request_id, 60, check)) is True


def test_whoever_wakes_the_others_lives_on_after_a_database_that_was_away(jobs, watcher, monkeypatch):
    first, second = (answer.request_id for answer in jobs.append([new(1), new(2)]))
    real, failures = jobs.finished_ids, [OperationalError("SELECT", {}, Exception("terminated"))]

    def finished_ids(request_ids):
        if failures:
            raise failures.pop()
        return real(request_ids)

    monkeypatch.setattr(jobs, "finished_ids", finished_ids)

    async def wait(request_id: int) -> bool:
        async def finish() -> None:
            jobs.commit([Outcome(request_id, b"")])

        done, _ = await asyncio.gather(watcher.wait(request_id, 30.0, lambda: False), finish())
        return done

    assert asyncio.run(wait(first)), "told to look for himself"
    assert not failures
    assert asyncio.run(wait(second))


def test_waiting_ends_with_the_time_or_with_the_service(jobs, watcher):
    (answer,) = jobs.append([new(1)])

    async def wait(limit_s: float, stop: bool) -> bool:
        task = asyncio.create_task(watcher.wait(answer.request_id, limit_s, lambda: False))
        while not watcher._waiting:
            await asyncio.sleep(0.001)
        if stop:
            watcher.stop()
        return await task

    assert asyncio.run(wait(0.02, stop=False)) is False
    assert asyncio.run(wait(60, stop=True)) is False


def test_who_waits_for_a_sampler_is_woken_by_what_it_finishes_next(jobs, watcher):
    """Not by what finished before the waiter's cursor, and not by other samplers."""
    samplers = [
        Sampler(
            sampler_id=name, session_id="s", seq=seq, base_model="m", served_name="m", kind="base", created_at=now()
        )
        for seq, name in enumerate("ab")
    ]
    first = NewJob("sample", "m", b"", sampler_id="a", seq_id=0, rows=tuple(samplers))
    more = [NewJob("sample", "m", b"", sampler_id=name, seq_id=1) for name in "ab"]
    one, two, other = (answer.request_id for answer in jobs.append([first, *more]))
    jobs.commit([Outcome(one, b"")])

    async def wait() -> tuple[bool, bool]:
        current, ahead = (asyncio.create_task(watcher.wait(("a", n), 60, lambda: False)) for n in (1, 2))
        while len(watcher._waiting) < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(jobs.commit, [Outcome(other, b"")])
        await asyncio.to_thread(jobs.commit, [Outcome(two, b"")])
        woken = await current
        watcher.stop()
        return woken, await ahead

    assert asyncio.run(wait()) == (True, False)
