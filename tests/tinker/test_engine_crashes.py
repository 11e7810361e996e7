"""Jobs that kill engines, and databases that go away: nobody else pays."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import OperationalError

from tests.tinker.engine_bench import BASE, Bench, Client, body_of
from tx.tinker.engine import ALONE_AFTER, MAX_ATTEMPTS


@pytest.fixture
def bench(tmp_path, sqlite_url, tiny_qwen3):
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3)
    yield bench
    bench.close()


def start(bench) -> None:
    """What is pending goes to the worker; then the process would die."""
    bench.engine._claim()
    bench.engine._advance_rebuilds()
    bench.engine._start_ready()


def attempts(bench, *request_ids: int) -> list[int]:
    return [bench.jobs.get(request_id).attempts for request_id in request_ids]


def test_a_job_is_blamed_only_if_the_worker_had_it(bench):
    client = Client(bench)
    bench.run(client.create())
    there, behind = client.train(1), client.step()
    start(bench)
    bench.restart()
    assert attempts(bench, there, behind) == [1, 0]
    assert [job.status for job in bench.run(there, behind)] == ["done", "done"]


def test_a_job_that_was_there_at_crashes_runs_alone_and_innocents_get_done(bench):
    killer, innocent = Client(bench), Client(bench, "sess-b")
    bench.run(killer.create(), innocent.create())
    killing, fine = killer.train(1), innocent.train(2)
    for _ in range(ALONE_AFTER):  # neither is resident after a crash: one sample-free rebuild each, then both run
        while len(bench.engine._running) < 2:
            bench.engine._claim()
            bench.engine._advance_rebuilds()
            bench.engine._start_ready()
        bench.restart()
    assert attempts(bench, killing, fine) == [ALONE_AFTER, ALONE_AFTER]

    while not bench.engine._running:
        start(bench)
    assert list(bench.engine._running) == [killing], "the oldest suspect, and nothing beside it"
    bench.restart()
    assert attempts(bench, killing, fine) == [ALONE_AFTER + 1, ALONE_AFTER]
    assert [job.status for job in bench.run(killing, fine)] == ["done", "done"]


def test_a_job_that_kills_every_engine_fails_at_last_and_the_others_go_on(bench):
    killer, innocent = Client(bench), Client(bench, "sess-b")
    bench.run(killer.create(), innocent.create())
    killing, fine = killer.train(1), innocent.train(2)
    for _ in range(MAX_ATTEMPTS):
        while killing not in bench.engine._running:
            start(bench)
        bench.restart()
    job, other, step = bench.run(killing, fine, killer.step())
    assert (job.status, job.category) == ("failed", "server")
    assert job.error == f"The engine died {MAX_ATTEMPTS} times while it had this forward_backward; given up."
    assert body_of(other)["metrics"]["loss:sum"] > 0
    body_of(step)


def away() -> OperationalError:
    return OperationalError("COMMIT", {}, Exception("disk I/O error"))


def test_a_commit_waits_for_the_database_and_nothing_runs_twice(bench, monkeypatch):
    monkeypatch.setattr("tx.tinker.endings.COMMIT_WAITS_S", (0.0, 0.0, 0.0))
    client = Client(bench)
    bench.run(client.create(), client.train(1))
    real, failures = bench.engine._jobs.commit, [away(), away(), away()]

    def commit(outcomes):
        if failures:
            raise failures.pop()
        real(outcomes)

    monkeypatch.setattr(bench.engine._jobs, "commit", commit)
    body_of(bench.run(client.step())[0])
    assert not failures
    assert bench.worker.export_model(client.model_id).step == 1


def test_a_database_that_stays_away_ends_the_engine_and_fails_no_job(bench, monkeypatch):
    monkeypatch.setattr("tx.tinker.endings.COMMIT_WAITS_S", (0.0,))
    client = Client(bench)
    bench.run(client.create(), client.train(1))
    step = client.step()

    def commit(_outcomes):
        raise away()

    monkeypatch.setattr(bench.engine._jobs, "commit", commit)
    with pytest.raises(OperationalError):
        bench.run(step)
    bench.restart()
    body_of(bench.run(step)[0])
    assert bench.worker.export_model(client.model_id).step == 1
    assert [job.kind for job in bench.jobs.history(client.model_id)] == [
        "create_model",
        "forward_backward",
        "optim_step",
    ]


def test_no_job_is_blamed_for_a_database_that_went_away(bench, monkeypatch):
    client = Client(bench)
    bench.run(client.create())
    there = client.train(1)
    start(bench)

    def compute():
        raise away()

    monkeypatch.setattr(bench.engine, "_compute", compute)
    monkeypatch.setattr(bench.engine._jobs, "requeue", lambda *_: 0)  # it goes on with what it has
    with pytest.raises(OperationalError):
        bench.engine.run(lambda: False)
    bench.restart()
    assert attempts(bench, there) == [0]
    body_of(bench.run(there)[0])


def test_a_job_whose_reading_fails_for_the_database_waits(bench, monkeypatch):
    client = Client(bench)
    bench.run(client.create(), client.train(1))

    def save(*_args):
        raise away()

    monkeypatch.setitem(bench.engine._work._handlers, "save_weights", save)
    request_id = client.do("save_weights", path="ck")
    with pytest.raises(OperationalError):
        bench.run(request_id)
    bench.restart()
    assert body_of(bench.run(request_id)[0])["path"] == f"tinker://{client.model_id}/weights/ck"
    assert bench.jobs.claim(BASE, 10) == []
