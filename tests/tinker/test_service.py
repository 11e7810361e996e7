"""Which names mean which base model, and housekeeping; the routes on top are tested in ``routes``."""

from __future__ import annotations

import pytest

from tx.tinker.config import TxConfig
from tx.tinker.db import RecordedSequence, now, open_database, reading, writing
from tx.tinker.service import KEEP_RECORDINGS_S, Service, fingerprint


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


def test_fingerprints_differ_with_content():
    assert fingerprint(b"a") == fingerprint(b"a") != fingerprint(b"b")
