"""Which names mean which base model, and housekeeping; the routes on top are tested in ``routes``."""

from __future__ import annotations

import pytest

from tests.tinker.conftest import Client
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, RecordedSequence, now, open_database, reading, writing
from tx.tinker.db import Session as SessionRow
from tx.tinker.service import KEEP_RECORDINGS_S, Service, fingerprint
from tx.tinker.sessions import EXPIRED_AFTER_S


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


def test_recordings_are_swept_a_day_after_their_last_use(service):
    with writing(service.db) as session:
        for name, age_s in (("old", KEEP_RECORDINGS_S + 5), ("new", KEEP_RECORDINGS_S - 60)):
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
    service = Service(config, open_database(config.resolved_database_url), clock=lambda: clock[0])
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


def test_fingerprints_differ_with_content():
    assert fingerprint(b"a") == fingerprint(b"a") != fingerprint(b"b")
