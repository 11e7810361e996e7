"""Checkpoints' rows: what is found when, which files go with which row, what the audit log hears; on both databases."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text
from sqlmodel import select

from tests.tinker.test_sessions import model_row
from tx.errors import InvalidInput, NotFound
from tx.tinker import checkpoint_rows
from tx.tinker.checkpoint_rows import CheckpointRows
from tx.tinker.db import AuditEntry, Checkpoint, open_database, reading, writing

MODEL = "s:train:0"


@pytest.fixture
def db(database_url):
    database = open_database(database_url)
    with writing(database) as session:
        session.add(model_row("s", 0))
        session.add(model_row("s", 1))
    yield database
    database.dispose()


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def rows(db, clock):
    return CheckpointRows(db, lambda: clock[0])


def add(db, name: str, model: str = MODEL, kind: str = "weights", **values) -> None:
    given = {"folder": f"{model}/{kind}/{name}", "size_bytes": 7, "created_at": 1.0} | values
    with writing(db) as session:
        session.add(Checkpoint(model_id=model, kind=kind, name=name, **given))


def names(found) -> list[str]:
    return [f"{row.kind}/{row.name}" for row in found]


def audited(db) -> list[tuple[str, str, dict]]:
    with reading(db) as session:
        entries = session.exec(select(AuditEntry).order_by(AuditEntry.id)).all()
    assert {entry.category for entry in entries} <= {"checkpoints"}
    assert {entry.model_id for entry in entries} <= {MODEL}
    return [(entry.event, entry.tinker_path.removeprefix(f"tinker://{MODEL}/"), entry.details) for entry in entries]


def test_pages_are_newest_first_and_hang_together(db, rows, clock):
    for name, created_at in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 2.0)):
        add(db, name, created_at=created_at)
    add(db, "x", kind="external_weights", created_at=9.0)
    add(db, "gone", created_at=9.0, expires_at=clock[0])
    whole, total = rows.page(10, 0)
    assert names(whole) == ["external_weights/x", "weights/a", "weights/d", "weights/c", "weights/b"]
    assert total == 5
    pages = [rows.page(2, offset) for offset in (0, 2, 4, 6)]
    assert [row for page, _ in pages for row in names(page)] == names(whole)
    assert {count for _, count in pages} == {5}
    without, count = rows.page(10, 0, ["weights", "sampler_weights"])
    assert (names(without), count) == (names(whole)[1:], 4)
    assert names(rows.of_model(MODEL)) == ["weights/b", "weights/c", "weights/d", "weights/a", "external_weights/x"]
    with pytest.raises(NotFound, match="training_run_id"):
        rows.of_model("s:train:9")


def test_publishing_is_idempotent_and_audited_once(db, rows):
    add(db, "a")
    for public in (True, True, False, False, True):
        rows.publish(MODEL, "weights/a", public)
        assert rows.of_model(MODEL)[0].public is public
    assert [event for event, _, _ in audited(db)] == [
        "checkpoint.publish",
        "checkpoint.unpublish",
        "checkpoint.publish",
    ]


def test_a_ttl_counts_from_the_clock_and_null_takes_it_back(db, rows, clock):
    add(db, "a")
    rows.set_ttl(MODEL, "weights/a", 3600)
    assert rows.of_model(MODEL)[0].expires_at == 4600.0
    rows.set_ttl(MODEL, "weights/a", None)
    clock[0] = 5000.0
    assert rows.expire() == []
    rows.set_ttl(MODEL, "weights/a", 3600)
    clock[0] = 8599.5
    assert rows.expire() == []
    clock[0] = 8600.0
    assert rows.of_model(MODEL) == []
    with pytest.raises(NotFound, match="checkpoint_id"):
        rows.set_ttl(MODEL, "weights/a", None)  # too late
    assert names(rows.expire()) == ["weights/a"]
    assert rows.expire() == []
    with reading(db) as session:
        assert session.exec(select(Checkpoint)).all() == []
    assert audited(db) == [
        ("checkpoint.set_ttl", "weights/a", {"ttl_seconds": 3600, "expires_at": 4600.0}),
        ("checkpoint.set_ttl", "weights/a", {"ttl_seconds": None, "expires_at": None}),
        ("checkpoint.set_ttl", "weights/a", {"ttl_seconds": 3600, "expires_at": 8600.0}),
        ("checkpoint.expire", "weights/a", {"size_bytes": 7}),
    ]


def test_files_go_with_the_last_row_that_names_them(db, rows, clock):
    add(db, "a", folder="shared")
    add(db, "b", folder="shared", expires_at=2000.0)
    add(db, "c", folder="shared")
    add(db, "d", folder="own", expires_at=2000.0)
    assert rows.delete(MODEL, "weights/a") is None
    clock[0] = 3000.0
    assert [row.folder for row in rows.expire()] == ["own"], "the copy c still needs the other"
    assert rows.delete(MODEL, "weights/c").folder == "shared"
    assert [event for event, _, _ in audited(db)] == ["checkpoint.delete"] + ["checkpoint.expire"] * 2 + [
        "checkpoint.delete"
    ]


def test_copies_that_expire_together_take_their_files_once(db, rows):
    for name in "abc":
        add(db, name, folder="shared", expires_at=2.0)
    assert [row.folder for row in rows.expire()] == ["shared"]


def test_of_copies_deleted_at_once_exactly_one_takes_the_files(db, rows):
    copies = [f"n{number}" for number in range(6)]
    for name in copies:
        add(db, name, folder="shared")
    barrier, told = threading.Barrier(len(copies)), []

    def delete(name: str) -> None:
        barrier.wait()
        told.append(rows.delete(MODEL, f"weights/{name}"))

    threads = [threading.Thread(target=delete, args=(name,)) for name in copies]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(told) == len(copies)
    assert [row.folder for row in told if row is not None] == ["shared"]


def test_a_copy_that_is_made_while_its_source_is_deleted_keeps_the_files(postgres_url):
    db, told = open_database(postgres_url), []
    add(db, "a", folder="shared")
    deletion = threading.Thread(target=lambda: told.append(CheckpointRows(db, lambda: 1.0).delete(MODEL, "weights/a")))
    with writing(db) as copying:
        copying.exec(select(Checkpoint).with_for_update()).one()
        deletion.start()
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        with db.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
            while watching.execute(waiting).scalar_one() == 0:
                assert deletion.is_alive(), "it did not wait for the source's lock"
        copy = {"model_id": "s:train:1", "kind": "weights", "name": "a", "size_bytes": 7, "created_at": 1.0}
        copying.add(Checkpoint(folder="shared", **copy))
    deletion.join()
    db.dispose()
    assert told == [None]


def test_many_expire_in_several_transactions(db, rows, monkeypatch):
    monkeypatch.setattr(checkpoint_rows, "_EXPIRE_AT_ONCE", 2)
    for name in "abcde":
        add(db, name, expires_at=2.0)
    assert sorted(names(rows.expire())) == [f"weights/{name}" for name in "abcde"]


@pytest.mark.parametrize(
    "checkpoint_id", ["", "a", "weights", "weights/", "weights/..", "weights/a/b", "other/a", "/a"]
)
def test_what_can_be_no_checkpoint_id_is_refused_and_names_the_field(db, rows, checkpoint_id):
    add(db, "a")
    for act in (rows.delete, lambda *ids: rows.publish(*ids, True), lambda *ids: rows.set_ttl(*ids, 3600)):
        with pytest.raises(InvalidInput, match="checkpoint_id") as refused:
            act(MODEL, checkpoint_id)
        assert not isinstance(refused.value, NotFound)


def test_a_checkpoint_belongs_to_its_model_and_kind(db, rows):
    add(db, "a")
    for model, checkpoint_id in (("s:train:1", "weights/a"), (MODEL, "sampler_weights/a"), (MODEL, "weights/b")):
        with pytest.raises(NotFound, match="checkpoint_id"):
            rows.delete(model, checkpoint_id)
    assert names(rows.of_model(MODEL)) == ["weights/a"]
    assert audited(db) == []
