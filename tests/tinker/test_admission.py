"""A full queue, and a full share of it, refuse new samples by name and nothing else."""

from __future__ import annotations

from tests.tinker.new_jobs import BASE, ids, new, sample
from tx.errors import InvalidInput, Overloaded
from tx.tinker.admission import Admission, Share
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
    assert any("COVERING INDEX ix_job_status_base_model" in step for step in steps), steps


def test_a_share_bounds_its_owner_alone(db):
    with writing(db) as session:
        for session_id, owner in (("s", "alice"), ("t", "alice"), ("u", "bob")):
            session.add(Session(session_id=session_id, owner=owner, created_at=0.0, heartbeat_at=0.0))
    jobs = JobTable(db)
    mine, others = Share("alice", 4), Share("bob", 4)
    ids(jobs.append([sample(0, num_sequences=3), sample(0, "t:sample:0", session_id="t"), new(1)]))
    with writing(db) as session:
        admission = Admission(session, None)
        refused = admission.admit(BASE, 1, mine)
        assert isinstance(refused, Overloaded)
        assert "4 sequences of this API key" in str(refused)
        assert admission.admit(BASE, 0, mine) is None, "no sample"
        assert admission.admit(BASE, 3, others) is None
        assert isinstance(admission.admit(BASE, 2, others), Overloaded), "what was just let in counts"
        assert isinstance(admission.admit(BASE, 5, others), InvalidInput), "it would be told to come back for ever"
        assert admission.admit(BASE, 100, None) is None
