"""Which names mean which base model, and housekeeping; the routes on top are tested in ``routes``."""

from __future__ import annotations

import pytest

from tests.support.clocks import Clocks
from tests.tinker.conftest import Client
from tx.tinker import uptime
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, Engine, Job, RecordedSequence, now, open_database, reading, writing
from tx.tinker.db import Session as SessionRow
from tx.tinker.jobs import Outcome
from tx.tinker.recordings import KEPT_S
from tx.tinker.service import ALIVE_S, KEEP_RESULTS_S, Service, fingerprint
from tx.tinker.sessions import EXPIRED_AFTER_S

DAY_S = 86400.0


def test_names_are_known_before_the_engine_registers(service):
    assert service.canonical("org/base") == "org/base"
    assert service.canonical("org/alias") is None


def test_a_registered_engine_brings_its_names(service, engine):
    assert service.canonical("org/alias") == "org/base"
    engine.beat(age_s=60)
    assert service.canonical("org/alias") == "org/base", "our own engine may be restarting: jobs may wait for it"


@pytest.fixture
def external(tmp_path):
    config = TxConfig(external_engine=True, database_url=f"sqlite:///{tmp_path / 'tx.db'}")
    made = Service(config, open_database(config.resolved_database_url))
    yield made
    made.close()


def test_external_engines_count_only_while_they_live(external, engine):
    assert external.canonical("org/alias") == "org/base"
    engine.beat(age_s=60)
    assert external.served_models() == {}


def test_files_that_cannot_be_deleted_keep_no_row_from_going(service, engine, caplog):
    """The row is gone already, and what is left is only wasted space: nobody is refused for it."""
    service.folders = CheckpointFolders("/dev/null/x")
    with writing(service.db) as session:
        session.add(
            Checkpoint(
                model_id="s:train:0", kind="weights", name="a", folder="s:train:0/weights/a", size_bytes=1,
                created_at=now() - 7200, expires_at=now() - 3600,
            )
        )  # fmt: skip
    service.sweep()
    with reading(service.db) as session:
        assert session.get(Checkpoint, 1) is None
    assert "files remain: /dev/null/x can't be deleted: Not a directory" in caplog.text


def test_recordings_are_swept_when_no_replay_will_want_them(service, monkeypatch):
    monkeypatch.setattr(uptime, "SETTLE_S", 0.0)
    with writing(service.db) as session:
        for name, age_s in (("old", KEPT_S + 5), ("new", KEPT_S - 60)):
            session.add(
                RecordedSequence(
                    sequence_id=name, session_id="s", tokens=b"", logprobs=b"", prompt=b"", used_at=now() - age_s
                )
            )
    service.sweep()
    with reading(service.db) as session:
        assert session.get(RecordedSequence, "old") is None
        assert session.get(RecordedSequence, "new") is not None


def test_samples_of_a_silent_session_are_cancelled_its_model_stays(config, running):
    clock = [now()]
    clocks = {"clock": lambda: clock[0], "steady": lambda: clock[0]}
    service = Service(config, open_database(config.resolved_database_url), **clocks)
    with Client(service) as client:
        session, other = client.new_session(), client.new_session()
        model = client.new_model(session)
        running.close()  # from here on nobody answers
        mine, others = (client.sample(client.new_sampler(one)) for one in (session, other))
        step = client.ask("optim_step", model_id=model, seq_id=1, adam_params={})
        clock[0] += EXPIRED_AFTER_S - 1
        assert service.cancel_abandoned() == 0
        with writing(service.db) as db:
            db.get(SessionRow, other).heartbeat_at = clock[0]
        clock[0] += 2
        assert service.cancel_abandoned() == 1
        assert client.result(mine)["error"] == "Cancelled: its session is over."
        for future in (others, step):
            assert service.jobs.get(int(future["request_id"])).status == "pending"
        assert client.ask("get_info", model_id=model)["model_id"] == model
        client.ask("session_heartbeat", session_id=session)
        assert client.sample(client.new_sampler(session, 1))["request_id"], "it may come back"
    service.close()


def test_silence_counts_from_when_we_could_hear(service, client):
    sample = client.sample(client.new_sampler())
    late = Service(service.config, open_database(service.config.resolved_database_url), clock=lambda: now() + 3600)
    assert late.cancel_abandoned() == 0, "it has only just started: heartbeats could not reach it before"
    assert service.jobs.get(int(sample["request_id"])).status == "pending"
    late.close()


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def leaping(config, running, clocks):
    """A service by these clocks, up for a day; nobody answers its clients."""
    db = open_database(config.resolved_database_url)
    service = Service(config, db, clock=lambda: clocks.wall, steady=lambda: clocks.steady)
    service.sweep()
    clocks.go_on(DAY_S)
    yield service
    service.close()


@pytest.mark.parametrize("leap_s", [9 * DAY_S, -9 * DAY_S])
def test_a_leap_of_the_clock_cancels_nothing_until_a_session_has_really_been_silent(leaping, running, clocks, leap_s):
    with Client(leaping) as client:
        session = client.new_session()
        running.close()
        sample = client.sample(client.new_sampler(session))
        with writing(leaping.db) as db:
            db.get(Job, int(sample["request_id"])).created_at = clocks.wall
        clocks.wall += leap_s
        assert leaping.cancel_abandoned() == 0
        clocks.go_on(EXPIRED_AFTER_S - 1)
        assert leaping.cancel_abandoned() == 0
        (found,) = client.ask("sessions/search")["sessions"]
        assert found["status"]["type"] == "active"
        if leap_s > 0:  # after one back, it has died in the future: its samples are only computed for nobody
            clocks.go_on(2)
            assert leaping.cancel_abandoned() == 1


@pytest.mark.parametrize("leap_s", [9 * DAY_S, -9 * DAY_S])
def test_a_leap_of_the_clock_deletes_no_answer_that_is_not_old(leaping, running, clocks, leap_s):
    with Client(leaping) as client:
        running.close()
        future = client.sample(client.new_sampler())
    request_id = int(future["request_id"])
    leaping.jobs.commit([Outcome(request_id, b"answer")])
    with writing(leaping.db) as db:
        db.get(Job, request_id).finished_at = clocks.wall

    def again() -> Service:
        """Killed and started again: it knows only what is in the file."""
        db = open_database(leaping.config.resolved_database_url)
        return Service(leaping.config, db, clock=lambda: clocks.wall, steady=lambda: clocks.steady)

    clocks.wall += leap_s
    for service in (leaping, again()):
        service.sweep()
        clocks.go_on(60)
        service.sweep()
        assert leaping.jobs.get(request_id).result == b"answer"
    clocks.wall -= leap_s
    service.sweep()
    clocks.go_on(KEEP_RESULTS_S - 300)
    service.sweep()
    assert leaping.jobs.get(request_id).result == b"answer"
    clocks.go_on(2 * KEEP_RESULTS_S)
    service.sweep()
    assert leaping.jobs.get(request_id).result is None, "it goes at last"
    service.close()


@pytest.mark.parametrize("leap_s", [9 * DAY_S, -9 * DAY_S])
def test_an_engine_is_alive_while_it_gives_signs_whatever_the_clock_does(leaping, clocks, leap_s):
    def state() -> tuple[str, str | None]:
        health = leaping.health()
        return health.status, health.detail

    def beat() -> None:
        with writing(leaping.db) as db:
            db.merge(Engine(base_model=leaping.config.base_model_name, state="ready", heartbeat_at=clocks.wall))

    beat()
    assert state() == ("ok", None)
    clocks.wall += leap_s
    assert state() == ("ok", None)
    clocks.go_on(1)
    beat()
    clocks.go_on(ALIVE_S - 1)
    assert state() == ("ok", None)
    clocks.wall += leap_s  # and this time it is dead
    assert state() == ("ok", None)
    clocks.go_on(2 * ALIVE_S + 2)
    status, detail = state()
    assert status == "failed"
    assert detail.startswith("no sign of life for ")


def test_fingerprints_differ_with_content():
    assert fingerprint(b"a") == fingerprint(b"a") != fingerprint(b"b")
