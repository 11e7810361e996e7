"""A commit elsewhere wakes the waiter; nothing between two waits is lost; silence times out."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from tx.tinker.db import open_database
from tx.tinker.jobs import JobTable, NewJob
from tx.tinker.notify import ChangeSignal


@pytest.fixture
def db(database_url):
    database = open_database(database_url)
    yield database
    database.dispose()


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
