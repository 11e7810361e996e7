"""A full queue, and a full share of it, refuse new samples by name and nothing else."""

from __future__ import annotations

from sqlalchemy import event

from tests.tinker.new_jobs import BASE, ids, new, sample
from tx.errors import InvalidInput, Overloaded
from tx.tinker.admission import COUNT_EVERY_S, Admission, Ask, Share
from tx.tinker.db import Session, open_database, writing
from tx.tinker.jobs import JobTable, Outcome


def test_a_full_queue_refuses_new_samples_only(db):
    jobs = JobTable(db, max_queued_samples=4)
    first, second = ids(jobs.append([sample(0, num_sequences=3), sample(1)]))
    jobs.claim(BASE, 1)
    assert jobs.unfinished_sequences(BASE) == 4
    refused, elsewhere, training, retried = jobs.append([sample(2), sample(3, base_model="other"), new(1), sample(0)])
    assert isinstance(refused, Overloaded)
    assert "4" in str(refused)
    assert ids([elsewhere, training, retried])[2] == first, "a retry finds its request however full the queue is"
    jobs.commit([Outcome(second, b"")])
    accepted, refused = jobs.append([sample(2), sample(4)])
    assert ids([accepted])[0] > second, "what was refused before left nothing behind"
    assert isinstance(refused, Overloaded)
    (huge,) = jobs.append([sample(5, num_sequences=5)])
    assert isinstance(huge, InvalidInput), "it would be told to come back for ever"
    assert jobs.unfinished_sequences(BASE) == 4


def test_counting_the_queue_reads_one_index(sqlite_url):
    """Rows hold payloads: a count that went through them would read them all, for every append."""
    with open_database(sqlite_url).connect() as connection:
        statement = (
            "EXPLAIN QUERY PLAN SELECT sum(num_sequences) FROM job "
            "WHERE status IN ('pending', 'running') AND base_model = 'm' AND num_sequences > 0"
        )
        steps = [row[3] for row in connection.exec_driver_sql(statement)]
    assert any("COVERING INDEX ix_job_queue" in step for step in steps), steps


def test_a_share_bounds_its_owner_alone(db):
    with writing(db) as session:
        for session_id, owner in (("s", "alice"), ("t", "alice"), ("u", "bob")):
            session.add(Session(session_id=session_id, owner=owner, created_at=0.0, heartbeat_at=0.0))
    jobs = JobTable(db)
    mine, others = Share("alice", 4), Share("bob", 4)
    ids(jobs.append([sample(0, num_sequences=3), sample(0, "t:sample:0", session_id="t"), new(1)]))
    admission = Admission(db, None)

    def admit(num_sequences, share):
        ask = Ask(BASE, num_sequences, share)
        admission.expect([ask])
        return admission.admit(ask)

    refused = admit(1, mine)
    assert isinstance(refused, Overloaded)
    assert "4 sequences of this API key" in str(refused)
    assert admit(0, mine) is None, "no sample"
    assert admit(3, others) is None
    admission.expect([Ask(BASE, 1, others)])
    assert isinstance(admission.admit(Ask(BASE, 2, others)), Overloaded), "what was just let in counts"
    assert isinstance(admit(5, others), InvalidInput), "it would be told to come back for ever"
    assert admit(100, None) is None


def test_the_queue_is_counted_now_and_then_and_before_anybody_is_refused(db):
    time, counts = [0.0], []
    event.listen(db, "before_cursor_execute", lambda *args: counts.append(1) if "sum(" in args[2] else None)
    admission = Admission(db, 100, clock=lambda: time[0])
    others = JobTable(db)

    def admitted(num_sequences):
        counts.clear()
        admission.expect([Ask(BASE, num_sequences)])
        return admission.admit(Ask(BASE, num_sequences)) is None, len(counts)

    assert admitted(30) == (True, 1)
    assert admitted(30) == (True, 0), "60 at most"
    assert admitted(50) == (True, 1), "none of them is in the table, so there is room"
    ids(others.append([sample(0, num_sequences=60)]))
    assert admitted(50) == (True, 0), "another process's are not seen at once"
    time[0] += COUNT_EVERY_S
    assert admitted(1) == (True, 1)
    assert admitted(41) == (False, 1)
