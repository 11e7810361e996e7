"""Copies of checkpoints: rows of their own, shared files, once per request."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlmodel import select

from tx.errors import InvalidInput, NotFound
from tx.tinker.copies import CopyRequest, copy_checkpoint
from tx.tinker.db import AuditEntry, Checkpoint, Model, Session, now, open_database, reading, writing
from tx.tinker.jobs import JobTable, NewJob
from tx.tinker.sessions import Sessions
from tx.tinker.wire.paths import TinkerPath

SOURCE = TinkerPath("s:train:0", "weights", "ck")
REQUEST = CopyRequest(SOURCE, project_id="p", idempotency_key="k")


def filled(url: str):
    db = open_database(url)
    with writing(db) as session:
        for session_id, finished_at in (("s", None), ("over", 1.0)):
            session.add(Session(session_id=session_id, created_at=1.0, heartbeat_at=1.0, finished_at=finished_at))
        session.add(
            Model(
                model_id="s:train:0", session_id="s", model_seq_id=0, base_model="b", served_name="alias", rank=4,
                seed=9, train_mlp=False, optimizer={"type": "adamw"}, user_metadata={"k": "v"}, created_at=1.0,
                last_request_at=1.0, state="ready",
            )
        )  # fmt: skip
        session.add(
            Checkpoint(
                model_id="s:train:0", kind="weights", name="ck", folder="s:train:0/weights/ck", size_bytes=10,
                created_at=1.0, expires_at=now() + 1000, public=True, user_metadata={"a": "b"}, seq_id=5,
                has_optimizer=True,
            )
        )  # fmt: skip
    return db


@pytest.fixture
def db(sqlite_url):
    made = filled(sqlite_url)
    yield made
    made.dispose()


def rows(db, path: TinkerPath) -> tuple[Checkpoint, Model, Session]:
    with reading(db) as session:
        model = session.get(Model, path.model_id)
        checkpoint = session.exec(select(Checkpoint).where(Checkpoint.model_id == path.model_id)).one()
        return checkpoint, model, session.get(Session, model.session_id)


def test_a_copy_shares_the_files_and_stands_alone(db):
    path = copy_checkpoint(db, REQUEST)
    checkpoint, model, session = rows(db, path)
    assert (path.kind, path.name) == ("weights", "ck")
    assert path.model_id != SOURCE.model_id
    assert (checkpoint.folder, checkpoint.size_bytes, checkpoint.has_optimizer) == ("s:train:0/weights/ck", 10, True)
    assert (checkpoint.user_metadata, checkpoint.public, checkpoint.expires_at) == ({"a": "b"}, False, None)
    assert checkpoint.created_at > 1.0
    shape = (model.base_model, model.served_name, model.rank, model.seed, model.train_mlp, model.user_metadata)
    assert shape == ("b", "alias", 4, 9, False, {"k": "v"})
    assert (model.state, model.source_path) == ("copy", str(SOURCE))
    assert (session.project_id, session.finish_reason) == ("p", "success")
    assert session.finished_at is not None
    with reading(db) as found:
        (entry,) = found.exec(select(AuditEntry)).all()
    assert (entry.event, entry.model_id, entry.tinker_path) == ("checkpoint.copy", path.model_id, str(path))
    assert entry.details == {"source": str(SOURCE)}


def test_a_copy_may_have_a_life_of_its_own(db):
    checkpoint, _, _ = rows(db, copy_checkpoint(db, replace(REQUEST, ttl_s=3600)))
    assert checkpoint.expires_at == checkpoint.created_at + 3600


def test_a_retry_is_the_first_copy_and_the_same_twice_are_two(db):
    first = copy_checkpoint(db, REQUEST)
    assert copy_checkpoint(db, REQUEST) == first
    assert copy_checkpoint(db, replace(REQUEST, idempotency_key="other")) != first
    assert copy_checkpoint(db, replace(REQUEST, idempotency_key=None)) != first
    with pytest.raises(InvalidInput, match="X-Idempotency-Key"):
        copy_checkpoint(db, replace(REQUEST, source=first))


def test_retries_at_the_same_time_are_one_copy(database_url):
    databases = [filled(database_url), *(open_database(database_url) for _ in range(3))]
    start = threading.Barrier(len(databases))
    made: list[TinkerPath] = []

    def copy(db) -> None:
        start.wait()
        made.append(copy_checkpoint(db, REQUEST))

    threads = [threading.Thread(target=copy, args=(db,)) for db in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
    with reading(databases[0]) as session:
        assert len(session.exec(select(Checkpoint)).all()) == 2
    for db in databases:
        db.dispose()


def test_into_a_session(db):
    into = CopyRequest(SOURCE, session_id="s", model_seq_id=7)
    path = copy_checkpoint(db, into)
    assert path == TinkerPath("s:train:7", "weights", "ck")
    assert copy_checkpoint(db, into) == path
    assert rows(db, path)[2].finished_at is None
    with pytest.raises(InvalidInput, match="model_seq_id"):
        copy_checkpoint(db, replace(into, model_seq_id=0))


def test_a_copy_of_a_copy_shares_the_same_files(db):
    again = copy_checkpoint(db, CopyRequest(copy_checkpoint(db, REQUEST)))
    assert rows(db, again)[0].folder == "s:train:0/weights/ck"


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"source": replace(SOURCE, name="none")}, NotFound, "source_path"),
        ({"session_id": "nobody"}, NotFound, "session_id"),
        ({"session_id": "over"}, InvalidInput, "session_id"),
    ],
)
def test_what_is_not_there_is_named(db, change, error, names):
    with pytest.raises(error, match=f"^{names}: got"):
        copy_checkpoint(db, replace(REQUEST, **change))
    with reading(db) as session:
        assert len(session.exec(select(Session)).all()) == 2


def test_an_expired_source_is_gone(db):
    with writing(db) as session:
        session.get(Checkpoint, 1).expires_at = now() - 1
    with pytest.raises(NotFound, match="source_path"):
        copy_checkpoint(db, REQUEST)


def test_nothing_trains_on_a_copy_or_takes_its_number(db):
    path = copy_checkpoint(db, CopyRequest(SOURCE, session_id="s", model_seq_id=7))
    with pytest.raises(InvalidInput, match=r"^model_id: got .*only holds a copy"):
        Sessions(db).model_for_work(path.model_id)
    model = Model(
        model_id=path.model_id, session_id="s", model_seq_id=7, base_model="b", served_name="b", rank=1, seed=0,
        created_at=2.0, last_request_at=2.0,
    )  # fmt: skip
    new = NewJob("create_model", "b", b"{}", session_id="s", model_id=path.model_id, seq_id=0, rows=(model,))
    (answer,) = JobTable(db).append([new])
    assert isinstance(answer, InvalidInput)
    assert answer.field == "model_seq_id"
    assert rows(db, path)[1].state == "copy"
