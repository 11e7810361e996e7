"""Opening, migrating and writing the database; both kinds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, inspect, make_url, text
from sqlmodel import SQLModel, select

from tx.errors import StartupError
from tx.tinker import migrations
from tx.tinker.api import create_app
from tx.tinker.config import TxConfig
from tx.tinker.db import AWAY, Checkpoint, Engine, Session, open_database, reading, writing
from tx.tinker.jobs import Appended, JobTable, NewJob, Outcome
from tx.tinker.recovery import plan_replay
from tx.tinker.service import Service


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


def test_a_file_that_can_only_be_read_is_refused(sqlite_url):
    open_database(sqlite_url).dispose()
    only_read = "import sys; from tx.tinker.db import open_database; open_database(sys.argv[1])"
    command = [sys.executable, "-c", only_read, sqlite_url]
    if os.geteuid() == 0:  # whom permissions don't bind while he has this capability
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    Path(make_url(sqlite_url).database).chmod(0o444)
    opened = subprocess.run(command, capture_output=True, text=True)
    assert opened.returncode == 1
    assert opened.stderr.splitlines()[-1].endswith("can't be opened: attempt to write a readonly database.")


def test_a_postgresql_that_can_only_be_read_is_refused_until_it_can_be_written(postgres_url):
    db = open_database(postgres_url)
    name = make_url(postgres_url).database
    with psycopg.connect(postgres_url, autocommit=True) as hand:
        hand.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with pytest.raises(StartupError, match="read-only transaction"):
            open_database(postgres_url)
        db.dispose()
        with pytest.raises(AWAY), writing(db) as session:
            session.add(session_row())
        hand.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with writing(db) as session:  # on a new connection: the one from before could only read for ever
        session.add(session_row())
    db.dispose()


# ---- a database of an older release, with what its users left in it ----

MODEL = "sess-old:train:0"
PAYLOAD, RESULT = b"a training request", b'{"path": "tinker://sess-old:train:0/weights/kept"}'


def rows_of_release_1() -> dict[str, list[dict]]:
    """One run as the first release stored it: trained, saved, sampled from, and a sample that still waits."""
    job = {"session_id": "sess-old", "base_model": "org/base", "payload_type": "application/json", "fingerprint": "f"}
    job |= {"tokens_in": 3, "tokens_out": 0, "created_at": 2.0}
    done = job | {"status": "done", "result_type": "application/json", "claimed_at": 2.5, "finished_at": 3.0}
    mine, sampled = {"model_id": MODEL}, {"sampler_id": "sess-old:sample:0", "kind": "sample"}
    return {
        "session": [
            {
                "session_id": "sess-old", "created_at": 1.0, "heartbeat_at": 1.0, "tags": '["old"]',
                "user_metadata": '{"k": "v"}', "sdk_version": "0.3.0", "idempotency_key": "once",
            }
        ],
        "model": [
            {
                "model_id": MODEL, "session_id": "sess-old", "model_seq_id": 0, "base_model": "org/base",
                "served_name": "org/base", "rank": 8, "seed": 1, "train_attn": True, "train_mlp": True,
                "train_unembed": False, "user_metadata": "{}", "created_at": 1.0, "last_request_at": 1.0,
                "state": "ready",
            }
        ],
        "sampler": [
            {
                "sampler_id": "sess-old:sample:0", "session_id": "sess-old", "seq": 0, "base_model": "org/base",
                "served_name": "org/base", "kind": "base", "created_at": 1.0,
            }
        ],
        "checkpoint": [
            {
                "model_id": MODEL, "kind": "weights", "name": name, "folder": f"{MODEL}/weights/{name}",
                "size_bytes": 10, "created_at": 2.0, "public": False, "user_metadata": "{}", "seq_id": 0,
                "has_optimizer": True,
            }
            for name in ("kept", "again")
        ],
        "job": [
            done | mine | {"kind": "create_model", "seq_id": 0, "payload": b"{}", "result": b"{}"},
            done | mine | {"kind": "forward_backward", "seq_id": 1, "payload": PAYLOAD, "result": b"out"},
            done | mine | {"kind": "save_weights", "seq_id": 2, "payload": b"{}", "result": RESULT},
            job | mine | {"kind": "optim_step", "seq_id": 3, "payload": b"{}", "status": "running"},
            done | sampled | {"seq_id": 0, "payload": b"{}", "result": b"text"},
            job | sampled | {"seq_id": 1, "payload": b"{}", "status": "pending"},
        ],
        "engine": [
            {
                "base_model": "org/base", "served_names": "[]", "state": "ready", "detail": "", "pid": 1,
                "max_context": 512, "vocab_size": 10, "tokenizer": "", "started_at": 1.0, "heartbeat_at": 1.0,
            }
        ],
        "recordedsequence": [
            {
                "sequence_id": "5-0", "session_id": "sess-old", "tokens": b"\1\0\0\0", "logprobs": b"\0\0\0\0",
                "prompt": b"", "used_at": 3.0,
            }
        ],
    }  # fmt: skip


def write_as_of(url: str, revision: str) -> None:
    """A database of that revision with those rows in it, written without today's table definitions."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    backend = make_url(url).get_backend_name()
    db = create_engine(make_url(url).set(drivername={"postgresql": "postgresql+psycopg"}.get(backend, backend)))
    with db.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        for table, rows in rows_of_release_1().items():
            for row in rows:
                if revision == "0002" and row.get("kind") == "sample":
                    row = row | {"num_sequences": 4} | ({"finish_seq": 1} if row["status"] == "done" else {})
                names = ", ".join(row)
                values = ", ".join(f":{name}" for name in row)
                connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)
    db.dispose()


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_an_older_database_is_migrated_with_what_is_in_it_and_served(database_url, revision, tmp_path):
    write_as_of(database_url, revision)
    config = TxConfig(base_model="org/base", data_dir=tmp_path, database_url=database_url)
    db = open_database(database_url)
    with db.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
    jobs = JobTable(db)
    # A retry from before the update finds its row, and the queue counts what waited.
    retry = NewJob("forward_backward", "org/base", PAYLOAD, "sess-old", MODEL, seq_id=1, fingerprint="f")
    assert jobs.append([retry]) == [Appended(2, created=False)]
    assert jobs.unfinished_sequences("org/base") == (1 if revision == "0001" else 4)
    # The new engine takes up what the old one left, and the model can be rebuilt.
    assert jobs.requeue("org/base", suspects=[4]) == 1
    assert [(job.request_id, job.attempts) for job in jobs.claim("org/base", 9)] == [(4, 1), (6, 0)]
    with reading(db) as session:
        starts = session.exec(select(Checkpoint)).all()
    assert [job.payload for job in plan_replay(MODEL, jobs.history(MODEL), starts).jobs] == [PAYLOAD]
    jobs.commit([Outcome(6, b"new text")])
    assert jobs.get(6).finish_seq == (1 if revision == "0001" else 2)
    # The API answers for all of it.
    service = Service(config, db)
    with TestClient(create_app(service), base_url="http://test/api/v1/") as http:
        assert http.post("retrieve_future", json={"request_id": "3"}).json()["path"].endswith("/kept")
        assert http.get("sessions/sess-old").json()["user_metadata"] == {"k": "v"}
        named = {one["checkpoint_id"] for one in http.get(f"training_runs/{MODEL}/checkpoints").json()["checkpoints"]}
        assert named == {"weights/kept", "weights/again"}
        again = http.post("create_session", json={"tags": []}, headers={"x-idempotency-key": "once"})
        assert again.json()["session_id"] == "sess-old"
        sample = {"sampling_session_id": "sess-old:sample:0", "seq_id": 2, "prompt": {"chunks": [{"tokens": [1]}]}}
        assert http.post("asample", json=sample).json()["request_id"] == "7"
    service.close()
