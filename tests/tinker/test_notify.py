"""A commit elsewhere wakes the waiter; nothing between two waits is lost; silence times out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tx.tinker.db import open_database
from tx.tinker.jobs import JobTable, NewJob, Outcome
from tx.tinker.notify import ChangeSignal


@pytest.fixture
def signals(database_url, db):
    pair = ChangeSignal(database_url), ChangeSignal(database_url)
    yield pair
    [signal.close() for signal in pair]


def append(db, signal) -> None:
    JobTable(db, signal).append([NewJob(kind="sample", base_model="m", payload=b"")])


def test_silence_times_out(signals):
    assert signals[0].wait(0.05) is False


def test_a_change_before_the_wait_counts_once(db, signals):
    waiter, announcer = signals
    append(db, announcer)
    assert waiter.wait(5) is True
    assert waiter.wait(0.05) is False


def test_a_waiter_wakes_while_it_waits(db, signals):
    waiter, announcer = signals
    waiting, heard = threading.Event(), []

    def wait() -> None:
        waiting.set()
        heard.append(waiter.wait(30))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    append(db, announcer)
    thread.join(20)
    assert heard == [True]


def test_only_what_is_heard_wakes_at_once(database_url, db, signals):
    """A topic wakes those who hear it; what one waiter took from its pipe stays in the others'."""
    engine, api = (ChangeSignal(database_url, (topic,)) for topic in ("appended", "finished"))
    jobs = JobTable(db, signals[0])
    [signal.wait(0) for signal in (engine, api, signals[1])]
    for topic, woken in (("appended", [True, False, True]), ("finished", [False, True, True])):
        signals[0].announce(topic)
        heard = [
            signal.wait(5 if wakes else 0.01) for signal, wakes in zip((engine, api, signals[1]), woken, strict=True)
        ]
        assert heard == woken
    (answer,) = jobs.append([NewJob(kind="sample", base_model="m", payload=b"")])
    assert engine.wait(5) is True
    jobs.commit([Outcome(answer.request_id, b"")])
    assert api.wait(5) is True
    engine.close()
    api.close()


def sqlite_signal(tmp_path):
    url = f"sqlite:///{tmp_path / 'tx.db'}"
    return open_database(url), ChangeSignal(url)


def test_many_announcements_wake_once(tmp_path):
    db, waiter = sqlite_signal(tmp_path)
    assert waiter.wait(0) is False
    for _ in range(70_000):  # more bytes than a pipe holds
        waiter.announce("finished")
    assert waiter.wait(5) is True
    assert waiter.wait(0) is False
    waiter.close()
    db.dispose()


def test_a_commit_that_nobody_announces_is_found(tmp_path):
    db, waiter = sqlite_signal(tmp_path)
    assert waiter.wait(0) is False
    JobTable(db).append([NewJob(kind="sample", base_model="m", payload=b"")])
    assert waiter.wait(5) is True
    waiter.close()
    db.dispose()


def test_pipes_of_dead_processes_are_removed(tmp_path):
    db, waiter = sqlite_signal(tmp_path)
    waiter.wait(0)
    folder = tmp_path / "tx.db-wake"
    (mine,) = folder.iterdir()
    os.mkfifo(folder / "appended.dead")  # nobody reads it
    waiter.announce("appended")
    assert list(folder.iterdir()) == [mine]
    assert waiter.wait(5) is True
    waiter.close()
    assert list(folder.iterdir()) == []
    db.dispose()


def test_without_pipes_the_database_is_probed(tmp_path):
    (tmp_path / "tx.db-wake").write_text("a file where the folder would be")
    db, waiter = sqlite_signal(tmp_path)
    announcer = ChangeSignal(f"sqlite:///{tmp_path / 'tx.db'}")
    assert waiter.wait(0) is False
    JobTable(db, announcer).append([NewJob(kind="sample", base_model="m", payload=b"")])
    assert waiter.wait(5) is True
    assert waiter.wait(0.01) is False
    waiter.close()
    announcer.close()
    db.dispose()


def test_another_process_is_heard(database_url, db, signals):
    script = (
        "import sys; from tx.tinker.db import open_database; from tx.tinker.jobs import JobTable, NewJob\n"
        "from tx.tinker.notify import ChangeSignal\n"
        "url = sys.argv[1]; db = open_database(url); signal = ChangeSignal(url)\n"
        "JobTable(db, signal).append([NewJob(kind='sample', base_model='m', payload=b'')])\n"
        "signal.close(); db.dispose()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, database_url])
    assert signals[0].wait(60)
    assert process.wait(60) == 0


def test_a_lost_listener_connection_is_made_again(postgres_url):
    db = open_database(postgres_url)
    waiter, announcer = ChangeSignal(postgres_url), ChangeSignal(postgres_url)
    with db.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    assert waiter.wait(0.2) is True, "what was said meanwhile is lost, so it must say: look"
    announcer.announce()
    assert waiter.wait(5) is True
    waiter.close()
    announcer.close()
    db.dispose()
