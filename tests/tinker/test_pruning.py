"""Pruning keeps what a recovery needs and the accounting, and the database small."""

from __future__ import annotations

from dataclasses import replace

from tests.tinker.new_jobs import BASE, ids, new, sample
from tx.tinker.db import Checkpoint, RecoveryPoint, Session, now, open_database, writing
from tx.tinker.jobs import JobTable, NewJob, Outcome
from tx.tinker.pruning import prune


def test_prune_keeps_what_a_recovery_needs_and_the_accounting(db):
    """A checkpoint is no reason to let payloads go: its owner may delete it."""
    jobs = JobTable(db)
    requests = ids(
        jobs.append([new(1), new(2), new(3), NewJob(kind="sample", base_model=BASE, payload=b"p", tokens_in=5), new(4)])
    )
    jobs.commit([Outcome(request, b"r", tokens_out=2) for request in requests[:4]])
    with writing(db) as session:
        session.add(
            Checkpoint(
                model_id="s:train:0",
                kind="weights",
                name="a",
                folder="f",
                size_bytes=1,
                created_at=0.0,
                seq_id=2,
                has_optimizer=True,
            )
        )
        session.add_all(
            RecoveryPoint(model_id="s:train:0", seq_id=seq, base_model=BASE, size_bytes=1, created_at=0.0)
            for seq in (1, 2)
        )
    assert prune(db, now() - 60) == 0
    prune(db, now() + 60)
    rows = [jobs.get(request) for request in requests]
    assert [row.result for row in rows] == [None] * 5
    assert [row.payload for row in rows] == [None, b"body", b"body", None, b"body"]
    assert (rows[3].tokens_in, rows[3].tokens_out, rows[3].status) == (5, 2, "done")


def test_prune_takes_all_of_a_session_that_is_long_over_and_has_nothing_left_to_do(db):
    jobs = JobTable(db)
    done, waits = ids(jobs.append([new(1), new(2)]))
    jobs.commit([Outcome(done, b"r")])
    with writing(db) as session:
        session.add(Session(session_id="s", created_at=0.0, heartbeat_at=0.0, finished_at=now()))

    def pruned_payload() -> bytes | None:
        prune(db, now() + 60)
        return jobs.get(done).payload

    assert pruned_payload() == b"body", "what waits may need it"
    jobs.commit([Outcome(waits, b"r")])
    with writing(db) as session:
        session.get(Session, "s").finished_at = now() + 3600
    assert pruned_payload() == b"body", "it has only just finished"
    with writing(db) as session:
        session.get(Session, "s").finished_at = now()
    assert pruned_payload() is None


def test_retention_keeps_the_database_small(sqlite_url, tmp_path):
    """Many rounds of work, each pruned: the file grows by the rows' accounting, not by what they carried."""
    database = open_database(sqlite_url)
    table = JobTable(database)
    sizes, body = [], bytes(20_000)
    for number in range(6):
        asks = [replace(sample(100 * number + n), payload=body) for n in range(100)]
        requests = ids(table.append(asks))
        table.commit([Outcome(request, body) for request in requests])
        prune(database, now() + 60)
        sizes.append((tmp_path / "tx.db").stat().st_size)
    carried = 100 * 2 * len(body)
    # Pages that pruning frees are taken again, but for one per row that was large: SQLite doesn't merge what is left.
    assert sizes[-1] - sizes[0] < 5 * 100 * 5000, sizes
    assert sizes[-1] < 2 * carried, sizes
    database.dispose()
