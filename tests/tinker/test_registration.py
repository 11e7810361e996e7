"""One engine per base model: a living one is refused company, a dead one is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tx.errors import StartupError
from tx.tinker import registration
from tx.tinker.db import Engine, now, open_database, reading, writing
from tx.tinker.notify import ChangeSignal
from tx.tinker.registration import Registration
from tx.types import ModelCard

CARD = ModelCard("m", vocab_size=100, max_context=64, eos_token_ids=(1,), num_params=10, weight_bytes=40)


@pytest.fixture
def db(sqlite_url):
    return open_database(sqlite_url)


def row(db) -> Engine:
    with reading(db) as session:
        return session.get(Engine, "m")


def other_engine(db, pid: int, heartbeat_at: float, state: str = "ready") -> None:
    with writing(db) as session:
        session.merge(Engine(base_model="m", state=state, pid=pid, heartbeat_at=heartbeat_at))


def test_the_row_says_what_happens(db, sqlite_url):
    mine = Registration(db, "m", ("m", "alias"))
    assert (row(db).state, row(db).served_names, row(db).pid) == ("starting", ["m", "alias"], os.getpid())
    mine.update("ready", card=CARD, tokenizer="org/m", decode_slots=16)
    assert row(db).decode_slots == 16
    assert (row(db).state, row(db).max_context, row(db).vocab_size, row(db).tokenizer) == ("ready", 64, 100, "org/m")
    seen, changes = row(db).heartbeat_at, ChangeSignal(sqlite_url)
    while row(db).heartbeat_at == seen:
        assert changes.wait(20 * registration.HEARTBEAT_S), "no heartbeat"
    mine.close("failed", "why")
    assert (row(db).state, row(db).detail) == ("failed", "why")


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0])
def test_a_living_engine_is_refused_company(db, monkeypatch, ahead_s):
    monkeypatch.setattr(registration, "DEAD_AFTER_S", 2.0)
    gone = threading.Event()

    def live() -> None:
        while not gone.wait(0.05):
            other_engine(db, os.getppid(), now() + ahead_s)

    other_engine(db, os.getppid(), now() + ahead_s)
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(StartupError, match="already serves m"):
            Registration(db, "m", ("m",))
    finally:
        gone.set()
        other.join()


@pytest.mark.parametrize("sign", ["no process", "silent", "silent, in the future", "stopped"])
def test_a_dead_engine_is_replaced(db, sign, monkeypatch):
    if sign == "no process":
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        other_engine(db, child.pid, now())
    elif sign == "silent, in the future":  # the clock was put back since, and a process of its id runs again
        monkeypatch.setattr(registration, "DEAD_AFTER_S", 0.2)
        other_engine(db, os.getppid(), now() + 9 * 86400)
    elif sign == "silent":
        other_engine(db, os.getppid(), now() - registration.DEAD_AFTER_S - 1)
    else:
        other_engine(db, os.getppid(), now(), state="stopped")
    Registration(db, "m", ("m",)).close()
    assert row(db).pid == os.getpid()
