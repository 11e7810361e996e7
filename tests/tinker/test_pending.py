"""Who is next, from queues that are long, shared by many, or both."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from tests.tinker.new_jobs import BASE, ids, new, sample
from tx.tinker import pending
from tx.tinker.db import open_database
from tx.tinker.jobs import JOB_KINDS, JobTable


def in_turn(db, limit: int, kinds=("sample",)) -> list[int]:
    with db.connect() as connection:
        return pending.in_turn(connection, BASE, kinds, limit)


@pytest.fixture
def queue(db) -> dict[str | None, list[int]]:
    """Ids of the samples of three sessions and of none, of different lengths; others' and running ones among them."""
    jobs = JobTable(db)
    ids(jobs.append([sample(None, base_model="other"), sample(None, session_id="z")]))
    jobs.claim(BASE, 1)
    queue: dict[str | None, list[int]] = {}
    for session_id, number in (("b", 5), ("a", 2), (None, 3), ("c", 1)):
        queue[session_id] = ids(jobs.append([sample(None, session_id=session_id)] * number))
    ids(jobs.append([new(1)]))
    return queue


def test_the_first_of_each_session_come_before_the_second_of_any(db, queue):
    a, b, c, none = (queue[name] for name in ("a", "b", "c", None))
    firsts, seconds = [b[0], a[0], none[0], c[0]], [b[1], a[1], none[1]]
    expected = [*firsts, *seconds, b[2], none[2], b[3], b[4]]
    for limit in range(1, len(expected) + 3):
        assert in_turn(db, limit) == expected[:limit]


def test_several_kinds_of_one_session_share_its_turns(db, queue):
    jobs = JobTable(db)  # the queue has one forward_backward of this session already
    later, last = ids(jobs.append([sample(None, session_id="s"), new(2)]))
    chosen = in_turn(db, 100, JOB_KINDS)
    mine = [request_id for request_id in chosen if all(request_id not in others for others in queue.values())]
    assert mine[1:] == [later, last]
    assert chosen.index(mine[0]) < chosen.index(queue["b"][1]) < chosen.index(later)


def test_the_oldest_of_some_kinds(db, queue):
    with db.connect() as connection:
        oldest = pending.oldest(connection, BASE, ("sample",), 6)
        assert oldest == [*queue["b"], queue["a"][0]]
        assert pending.any_pending(connection, BASE, ("forward_backward",))
        assert not pending.any_pending(connection, BASE, ("optim_step",))
        assert not pending.any_pending(connection, "nobody's", JOB_KINDS)


def test_no_query_reads_more_than_it_needs_of_the_index(sqlite_url):
    """A hundred thousand rows with their payloads would be read while all the others wait."""
    db = open_database(sqlite_url)
    asked: list[tuple[str, tuple]] = []
    event.listen(db, "before_cursor_execute", lambda *args: asked.append((args[2], args[3])))
    ids(JobTable(db).append([sample(None, session_id=name) for name in "ab"]))
    asked.clear()
    with db.connect() as connection:
        pending.any_pending(connection, BASE, ("sample",))
        pending.in_turn(connection, BASE, ("sample",), 10)
        queries = [query for query in asked if "job" in query[0]]
        plans = [[row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {q}", v)] for q, v in queries]
    db.dispose()
    assert len(plans) == 5, "any, the sessions, of none, and of either"
    searches = [step for plan in plans for step in plan if "job" in step]
    assert searches
    for step in searches:
        assert step.startswith("SEARCH job USING COVERING INDEX ix_job_queue (status=? AND base_model=? AND kind="), (
            step
        )
