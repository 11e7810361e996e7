"""Opening, migrating and writing the database; both kinds."""

from __future__ import annotations

import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlmodel import SQLModel, select

from tx.errors import StartupError
from tx.tinker.db import Engine, Session, open_database, reading, writing


def session_row(name: str = "s") -> Session:
    return Session(session_id=name, created_at=1.0, heartbeat_at=1.0, tags=["a"], user_metadata={"k": "v"})


def test_migrations_end_where_the_tables_are_declared(database_url):
    db = open_database(database_url)
    with db.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
    db.dispose()


def test_opening_again_changes_nothing(database_url):
    db = open_database(database_url)
    with writing(db) as session:
        session.add(session_row())
    db.dispose()
    db = open_database(database_url)
    with reading(db) as session:
        row = session.get(Session, "s")
    assert (row.tags, row.user_metadata) == (["a"], {"k": "v"})
    db.dispose()


def test_api_and_engine_may_open_a_new_database_together(database_url):
    barrier, errors, dbs = threading.Barrier(4), [], []

    def start() -> None:
        barrier.wait()
        try:
            dbs.append(open_database(database_url))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    assert "job" in inspect(dbs[0]).get_table_names()
    [db.dispose() for db in dbs]


def test_concurrent_read_then_write_transactions_wait_for_each_other(database_url):
    db = open_database(database_url)
    with writing(db) as session:
        session.add(Engine(base_model="m", pid=0))

    def bump() -> None:
        for _ in range(20):
            with writing(db) as session:
                row = session.exec(select(Engine).with_for_update()).one()
                row.pid += 1

    threads = [threading.Thread(target=bump) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with reading(db) as session:
        assert session.get(Engine, "m").pid == 80
    db.dispose()


def test_a_raised_exception_rolls_back(database_url):
    db = open_database(database_url)

    def broken() -> None:
        with writing(db) as session:
            session.add(session_row())
            session.flush()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    with reading(db) as session:
        assert session.get(Session, "s") is None
    db.dispose()


def test_sqlite_is_durable_and_lets_readers_read(sqlite_url):
    db = open_database(sqlite_url)
    with db.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
    db.dispose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "in-memory"),
        ("mysql://h/d", "mysql"),
        ("nonsense", "can't be read"),
        ("sqlite:////proc/nowhere/tx.db", "can't be opened"),
        ("postgresql://u:secret@127.0.0.1:1/d", "can't be opened"),
    ],
)
def test_a_database_that_cannot_be_opened_is_one_sentence(url, says):
    with pytest.raises(StartupError, match=says) as error:
        open_database(url)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
