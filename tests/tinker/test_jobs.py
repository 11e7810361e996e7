"""The job table on SQLite and on a real PostgreSQL: idempotency, order, final states."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.tinker.new_jobs import BASE, ids, new, sample
from tx.errors import InvalidInput
from tx.tinker.db import Job, Model, Sampler, Session, now, open_database, reading, writing
from tx.tinker.jobs import Appended, JobTable, NewJob, Outcome
from tx.tinker.notify import ChangeSignal


@pytest.fixture
def jobs(db):
    return JobTable(db)


def model_row(model_id: str = "s:train:0") -> Model:
    return Model(
        model_id=model_id, session_id="s", model_seq_id=0, base_model=BASE, served_name=BASE, rank=4, seed=1,
        created_at=now(), last_request_at=now(),
    )  # fmt: skip


def test_c11_a_retry_returns_the_first_request(jobs):
    first = ids(jobs.append([new(1), new(2)]))
    answers = jobs.append([new(2), new(1), new(3)])
    assert [answer.created for answer in answers] == [False, False, True]
    assert ids(answers)[:2] == first[::-1]
    assert len(jobs.claim(BASE, 100)) == 3


def test_c11_a_retry_inside_one_batch_is_found(jobs):
    answers = jobs.append([new(1), new(1)])
    assert ids(answers)[0] == ids(answers)[1]
    assert [answer.created for answer in answers] == [True, False]


def test_c11_concurrent_retries_create_one_row(db, jobs):
    barrier, answers = threading.Barrier(6), []

    def append() -> None:
        barrier.wait()
        answers.extend(JobTable(db).append([new(seq) for seq in range(5)]))

    threads = [threading.Thread(target=append) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(ids(answers))) == 5
    assert sum(answer.created for answer in answers) == 5


def test_c11_samples_are_deduplicated_per_sampler_with_int64_seq(jobs):
    seq = 827701264000000000
    asks = [
        NewJob(kind="sample", base_model=BASE, payload=b"", session_id="s", sampler_id=f"s:sample:{n}", seq_id=seq)
        for n in (0, 1, 0)
    ]
    a, b, again = ids(jobs.append(asks))
    assert a == again != b


def test_a_seq_taken_by_another_request_is_refused_by_name(jobs):
    jobs.append([new(1, fingerprint="x")])
    other_kind, other_body, good = jobs.append([new(1, kind="optim_step"), new(1, fingerprint="y"), new(2)])
    assert isinstance(other_kind, InvalidInput)
    assert other_kind.field == "seq_id"
    assert "forward_backward" in str(other_kind)
    assert isinstance(other_body, InvalidInput)
    assert isinstance(good, Appended), "a bad neighbour must not stop it"


def test_jobs_without_seq_are_never_merged(jobs):
    assert len(set(ids(jobs.append([new(None, kind="unload_model"), new(None, kind="unload_model")])))) == 2


def test_rows_appear_with_their_job_and_only_once(db, jobs):
    create = new(0, kind="create_model", rows=(model_row(),))
    jobs.append([create])
    with writing(db) as session:
        model = session.get(Model, "s:train:0")
        model.state = "ready"
        session.add(model)
    jobs.append([create])
    with reading(db) as session:
        assert session.get(Model, "s:train:0").state == "ready", "a retry must not overwrite the model"


def test_a_sampler_number_in_use_is_refused(db, jobs):
    sampler = Sampler(
        sampler_id="s:sample:0", session_id="s", seq=0, base_model=BASE, served_name=BASE, kind="snapshot",
        created_at=now(),
    )  # fmt: skip
    kind = "save_weights_for_sampler"
    jobs.append([new(1, kind=kind, rows=(sampler.model_copy(),))])
    (answer,) = jobs.append([new(2, kind=kind, rows=(sampler.model_copy(),))])
    assert isinstance(answer, InvalidInput)
    assert answer.field == "sampling_session_seq_id"


def test_claim_takes_the_oldest_of_its_base_model(jobs):
    jobs.append([new(1), NewJob(kind="sample", base_model="other", payload=b""), new(2), new(3, kind="optim_step")])
    first = jobs.claim(BASE, 2)
    assert [(job.seq_id, job.status, job.payload) for job in first] == [
        (1, "running", b"body"),
        (2, "running", b"body"),
    ]
    assert jobs.claim(BASE, 9, kinds=["sample"]) == []
    assert [job.kind for job in jobs.claim(BASE, 9, kinds=["optim_step"])] == ["optim_step"]
    assert jobs.claim(BASE, 9) == []
    assert [job.base_model for job in jobs.claim("other", 9)] == ["other"]


def test_claiming_in_turn_takes_of_every_session(jobs):
    names = [*["greedy"] * 6, "late", "late", None]
    requests = ids(jobs.append([sample(None, f"{name}:sample:0", session_id=name) for name in names]))
    first = jobs.claim(BASE, 4, kinds=["sample"], in_turn=True)
    assert [job.request_id for job in first] == [requests[n] for n in (0, 1, 6, 8)]
    second = jobs.claim(BASE, 9, kinds=["sample"], in_turn=True)
    assert [job.request_id for job in second] == [requests[n] for n in (2, 3, 4, 5, 7)]
    assert jobs.claim(BASE, 9, in_turn=True) == []


def test_commit_writes_result_and_rows_in_one_transaction(db, jobs):
    (request,) = ids(jobs.append([new(1, tokens_in=7, rows=(model_row(),))]))
    jobs.claim(BASE, 1)
    ready = model_row()
    ready.state = "ready"
    jobs.commit([Outcome(request, b"answer", "ForwardBackwardOutput", tokens_out=3, tokens_cached=2, rows=[ready])])
    job = jobs.get(request)
    assert (job.status, job.result, job.result_type) == ("done", b"answer", "ForwardBackwardOutput")
    assert (job.tokens_in, job.tokens_out, job.tokens_cached) == (7, 3, 2)
    assert job.finished_at is not None
    with reading(db) as session:
        assert session.get(Model, "s:train:0").state == "ready"


def test_a_failing_commit_leaves_nothing_behind(db, jobs):
    (request,) = ids(jobs.append([new(1)]))
    jobs.claim(BASE, 1)
    broken = Model(model_id="m", session_id=None, model_seq_id=0)
    with pytest.raises(Exception, match=r"(?i)null"):
        jobs.commit([Outcome(request, b"answer", rows=[broken])])
    assert jobs.finished_ids([request]) == set()
    assert jobs.get(request).status == "running"


@pytest.mark.parametrize(
    ("act", "kind", "moves_from"),
    [
        ("commit", "optim_step", {"pending": "done", "running": "done"}),
        ("fail", "optim_step", {"pending": "failed", "running": "failed"}),
        ("cancel", "optim_step", {"pending": "failed"}),
        ("cancel", "sample", {"pending": "failed", "running": "failed"}),
        ("requeue", "optim_step", {"running": "pending"}),
        ("claim", "optim_step", {"pending": "running"}),
        ("start", "sample", {}),
    ],
)
@pytest.mark.parametrize("state", ["pending", "running", "done", "failed"])
def test_every_arrow_of_the_state_machine_and_no_other(sqlite_url, act, kind, moves_from, state):
    jobs = JobTable(open_database(sqlite_url))
    (request,) = ids(jobs.append([sample(1) if kind == "sample" else new(1, kind=kind)]))
    verbs: dict[str, Callable[[], object]] = {
        "commit": lambda: jobs.commit([Outcome(request, b"second")]),
        "fail": lambda: jobs.fail(request, "because", "server"),
        "cancel": lambda: jobs.cancel(request),
        "requeue": lambda: jobs.requeue(BASE),
        "claim": lambda: jobs.claim(BASE, 1),
        "start": lambda: jobs.start([request]),
    }
    reach = {"pending": [], "running": ["claim"], "done": ["claim", "commit"], "failed": ["claim", "fail"]}
    [verbs[verb]() for verb in reach[state]]
    assert jobs.get(request).status == state
    before = jobs.get(request)
    verbs[act]()
    after = jobs.get(request)
    assert after.status == moves_from.get(state, state)
    if state in ("done", "failed"):
        assert after.model_dump() == before.model_dump(), "a finished job keeps its first outcome"


def test_a_cancelled_job_is_handed_to_the_engine_that_had_it_once(jobs):
    pending, running, other, training, done = ids(
        jobs.append([sample(0), sample(1), sample(2, base_model="other"), new(1), sample(3)])
    )
    jobs.commit([Outcome(done, b"r")])
    assert [job.request_id for job in jobs.claim(BASE, 9)] == [pending, running, training]
    assert jobs.requeue(BASE) == 3
    assert [job.request_id for job in jobs.claim(BASE, 9, kinds=["optim_step", "forward_backward"])] == [training]
    jobs.claim("other", 1)
    assert jobs.cancel(pending) == 1, "no engine has it"
    assert jobs.take_cancelled(BASE) == []
    (running_again,) = ids(jobs.append([sample(1)]))
    assert running_again == running
    jobs.claim(BASE, 9)
    assert jobs.cancel(running, other, training, done, 999) == 2
    assert jobs.cancel(running) == 0, "cancelled twice"
    assert jobs.take_cancelled(BASE) == [running]
    assert jobs.take_cancelled(BASE) == []
    assert jobs.take_cancelled("other") == [other]
    found = jobs.get(running)
    assert (found.status, found.category, found.error) == ("failed", "user", "Cancelled by the client.")
    jobs.commit([Outcome(running, b"too late")])
    assert jobs.get(running).result is None
    assert (jobs.get(training).status, jobs.get(done).status) == ("running", "done")


def test_completions_of_a_sampler_go_on_where_the_last_look_ended(db, jobs):
    mine = ids(jobs.append([sample(seq) for seq in range(4)]))
    (other,) = ids(jobs.append([sample(0, "s:sample:1")]))
    with writing(db) as session:
        for seq in (0, 1):
            row = {"session_id": "s", "base_model": BASE, "served_name": BASE, "kind": "base", "created_at": now()}
            session.add(Sampler(sampler_id=f"s:sample:{seq}", seq=seq, **row))
    assert jobs.completions("s:sample:0", 0) == []
    jobs.commit([Outcome(mine[2], b"123"), Outcome(other, b"")])
    jobs.fail(mine[0], "no", "user")
    found = jobs.completions("s:sample:0", 0)
    assert [(one.request_id, one.seq_id, one.failed, one.num_bytes) for one in found] == [
        (mine[2], 2, False, 3),
        (mine[0], 0, True, None),
    ]
    jobs.cancel(mine[3])
    jobs.commit([Outcome(mine[1], b"")])
    later = jobs.completions("s:sample:0", found[-1].finish_seq)
    assert [one.request_id for one in later] == [mine[3], mine[1]]
    assert jobs.completions("s:sample:0", 0, limit=3) == found + later[:1]
    assert jobs.last_finished(["s:sample:0", "s:sample:1", "nobody"]) == {
        "s:sample:0": later[-1].finish_seq,
        "s:sample:1": 1,
    }


def test_concurrent_finishes_are_never_behind_a_cursor(db):
    """Who reads up to a finish_seq must not miss a smaller one that becomes visible later."""
    jobs = JobTable(db)
    requests = ids(jobs.append([sample(seq) for seq in range(60)]))
    threads = [
        threading.Thread(target=lambda mine=requests[n::3]: [jobs.commit([Outcome(one, b"")]) for one in mine])
        for n in range(3)
    ]
    [thread.start() for thread in threads]
    seen, cursor = [], 0
    while len(seen) < len(requests):
        alive = any(thread.is_alive() for thread in threads)
        found = jobs.completions("s:sample:0", cursor)
        seen += [one.request_id for one in found]
        cursor = found[-1].finish_seq if found else cursor
        assert alive or found, "a finished job was passed over"
    [thread.join() for thread in threads]
    assert sorted(seen) == requests


def test_samples_whose_client_is_gone(db, jobs):
    with writing(db) as session:
        for name, heartbeat_at, finished_at in (("gone", 50.0, None), ("here", 150.0, None), ("ended", 150.0, 160.0)):
            session.add(Session(session_id=name, created_at=1.0, heartbeat_at=heartbeat_at, finished_at=finished_at))
    gone, _, ended, train = ids(
        jobs.append(
            [
                *(sample(0, f"{name}:sample:0", session_id=name) for name in ("gone", "here", "ended")),
                NewJob("optim_step", BASE, b"", session_id="gone", model_id="gone:train:0", seq_id=1),
            ]
        )
    )
    late = ids(jobs.append([sample(1, "gone:sample:0", session_id="gone")]))[0]
    with writing(db) as session:
        for request_id, created_at in ((gone, 60.0), (train, 60.0), (late, 110.0)):
            session.merge(Job(**(session.get(Job, request_id).model_dump() | {"created_at": created_at})))
    assert jobs.abandoned_samples(before=100.0) == [gone, ended], "a new request is a sign of life too"
    assert jobs.unfinished_samples("gone") == [gone, late]
    jobs.cancel(gone)
    jobs.commit([Outcome(ended, b"")])
    assert jobs.abandoned_samples(before=100.0) == []


def test_failure_carries_message_and_category(jobs):
    (request,) = ids(jobs.append([new(1)]))
    jobs.fail(request, "data[0]: nonsense", "user")
    job = jobs.get(request)
    assert (job.status, job.error, job.category) == ("failed", "data[0]: nonsense", "user")


def test_a_job_known_to_be_wrong_is_appended_as_failed(jobs):
    (request,) = ids(jobs.append([new(1, error="base_model: unknown")]))
    assert jobs.claim(BASE, 9) == []
    assert jobs.get(request).error == "base_model: unknown"
    assert ids(jobs.append([new(1, error="base_model: unknown")])) == [request]


def test_finished_takes_more_ids_than_a_statement_has_variables(jobs):
    requests = ids(jobs.append([new(seq) for seq in range(1200)]))
    jobs.commit([Outcome(request, b"x") for request in requests[::2]])
    assert jobs.finished_ids(requests) == set(requests[::2])


def test_history_is_what_went_well_in_seq_order(jobs):
    requests = ids(jobs.append([new(3), new(1), new(2), new(4)]))
    jobs.commit([Outcome(request, b"") for request in requests[:2]])
    jobs.fail(requests[2], "no", "user")
    assert [job.seq_id for job in jobs.history("s:train:0")] == [1, 3]


def test_verbs_announce_to_another_process(database_url, db):
    signal, other = ChangeSignal(database_url), ChangeSignal(database_url)
    jobs = JobTable(db, other)
    assert not signal.wait(0)
    (request,) = ids(jobs.append([new(1)]))
    assert signal.wait(5)
    jobs.commit([Outcome(request, b"")])
    assert signal.wait(5)
    signal.close()
    other.close()


def test_request_ids_grow_and_are_never_reused(db, jobs):
    (first,) = ids(jobs.append([new(1)]))
    with writing(db) as session:
        session.delete(session.get(Job, first))
    assert ids(jobs.append([new(1)]))[0] > first
