"""The job table on SQLite and on a real PostgreSQL: idempotency, order, final states, pruning."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tx.errors import InvalidInput
from tx.tinker.db import Checkpoint, Job, Model, Sampler, now, open_database, reading, writing
from tx.tinker.jobs import Appended, JobTable, NewJob, Outcome
from tx.tinker.notify import ChangeSignal

BASE = "org/base"


@pytest.fixture
def db(database_url):
    database = open_database(database_url)
    yield database
    database.dispose()


@pytest.fixture
def jobs(db):
    return JobTable(db)


def new(seq: int | None, kind: str = "forward_backward", model_id: str | None = "s:train:0", **values) -> NewJob:
    return NewJob(kind=kind, base_model=BASE, payload=b"body", session_id="s", model_id=model_id, seq_id=seq, **values)


def ids(answers: list[Appended | InvalidInput]) -> list[int]:
    assert all(isinstance(answer, Appended) for answer in answers), answers
    return [answer.request_id for answer in answers]


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


def test_commit_writes_result_and_rows_in_one_transaction(db, jobs):
    (request,) = ids(jobs.append([new(1, tokens_in=7, rows=(model_row(),))]))
    jobs.claim(BASE, 1)
    ready = model_row()
    ready.state = "ready"
    jobs.commit([Outcome(request, b"answer", "ForwardBackwardOutput", tokens_out=3, rows=[ready])])
    job = jobs.finished([request])[request]
    assert (job.status, job.result, job.result_type) == ("done", b"answer", "ForwardBackwardOutput")
    assert (job.tokens_in, job.tokens_out) == (7, 3)
    assert job.finished_at is not None
    with reading(db) as session:
        assert session.get(Model, "s:train:0").state == "ready"


def test_a_failing_commit_leaves_nothing_behind(db, jobs):
    (request,) = ids(jobs.append([new(1)]))
    jobs.claim(BASE, 1)
    broken = Model(model_id="m", session_id=None, model_seq_id=0)
    with pytest.raises(Exception, match=r"(?i)null"):
        jobs.commit([Outcome(request, b"answer", rows=[broken])])
    assert jobs.finished([request]) == {}
    assert jobs.get(request).status == "running"


@pytest.mark.parametrize(
    ("act", "moves_from"),
    [
        ("commit", {"pending": "done", "running": "done"}),
        ("fail", {"pending": "failed", "running": "failed"}),
        ("cancel", {"pending": "failed"}),
        ("requeue", {"running": "pending"}),
        ("claim", {"pending": "running"}),
    ],
)
@pytest.mark.parametrize("state", ["pending", "running", "done", "failed"])
def test_every_arrow_of_the_state_machine_and_no_other(sqlite_url, act, moves_from, state):
    jobs = JobTable(open_database(sqlite_url))
    (request,) = ids(jobs.append([new(1)]))
    verbs: dict[str, Callable[[], object]] = {
        "commit": lambda: jobs.commit([Outcome(request, b"second")]),
        "fail": lambda: jobs.fail(request, "because", "server"),
        "cancel": lambda: jobs.cancel(request),
        "requeue": lambda: jobs.requeue(BASE),
        "claim": lambda: jobs.claim(BASE, 1),
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


def test_failure_carries_message_and_category(jobs):
    (request,) = ids(jobs.append([new(1)]))
    jobs.fail(request, "data[0]: nonsense", "user")
    job = jobs.finished([request])[request]
    assert (job.status, job.error, job.category) == ("failed", "data[0]: nonsense", "user")


def test_a_job_known_to_be_wrong_is_appended_as_failed(jobs):
    (request,) = ids(jobs.append([new(1, error="base_model: unknown")]))
    assert jobs.claim(BASE, 9) == []
    assert jobs.finished([request])[request].error == "base_model: unknown"
    assert ids(jobs.append([new(1, error="base_model: unknown")])) == [request]


def test_finished_takes_more_ids_than_a_statement_has_variables(jobs):
    requests = ids(jobs.append([new(seq) for seq in range(1200)]))
    jobs.commit([Outcome(request, b"x") for request in requests[::2]])
    assert jobs.finished_ids(requests) == set(requests[::2]) == set(jobs.finished(requests))


def test_history_is_what_went_well_in_seq_order(jobs):
    requests = ids(jobs.append([new(3), new(1), new(2), new(4)]))
    jobs.commit([Outcome(request, b"") for request in requests[:2]])
    jobs.fail(requests[2], "no", "user")
    assert [job.seq_id for job in jobs.history("s:train:0")] == [1, 3]


def test_prune_keeps_what_a_recovery_needs_and_the_accounting(db, jobs):
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
    assert jobs.prune(before=now() - 60) == 0
    jobs.prune(before=now() + 60)
    rows = [jobs.get(request) for request in requests]
    assert [row.result for row in rows] == [None] * 5
    assert [row.payload for row in rows] == [None, None, b"body", None, b"body"]
    assert (rows[3].tokens_in, rows[3].tokens_out, rows[3].status) == (5, 2, "done")


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
