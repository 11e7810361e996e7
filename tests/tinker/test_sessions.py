"""Sessions and samplers: created once, whoever asks how often; on both databases."""

from __future__ import annotations

import threading

import pytest

from tx.errors import InvalidInput, NotFound
from tx.tinker.db import Checkpoint, Model, Sampler, Session, now, writing
from tx.tinker.sessions import Sessions
from tx.tinker.wire.paths import parse_path


@pytest.fixture
def sessions(db):
    return Sessions(db)


def row(key: str | None = None) -> Session:
    return Session(session_id="", created_at=now(), heartbeat_at=0.0, idempotency_key=key)


def sampler(session: str, base: str = "m") -> Sampler:
    return Sampler(
        sampler_id=f"{session}:sample:0",
        session_id=session,
        seq=0,
        base_model=base,
        served_name=base,
        kind="base",
        created_at=now(),
    )


def model_row(session_id: str, number: int) -> Model:
    """Model number ``number`` of a session."""
    return Model(
        model_id=f"{session_id}:train:{number}",
        session_id=session_id,
        model_seq_id=number,
        base_model="m",
        served_name="m",
        rank=1,
        seed=0,
        created_at=0.0,
        last_request_at=0.0,
    )


def test_c11_concurrent_retries_of_a_creation_make_one_session(db):
    barrier, made = threading.Barrier(5), []

    def create() -> None:
        barrier.wait()
        made.append(Sessions(db).create(row("key")))

    threads = [threading.Thread(target=create) for _ in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 5
    assert len(set(made)) == 1


def test_without_a_key_every_creation_is_new(sessions):
    assert sessions.create(row()) != sessions.create(row())


def test_heartbeat_and_finish(sessions):
    session = sessions.create(row())
    other = sessions.create(row())
    assert sessions.heartbeat(session, other, "nobody") == {session: True, other: True}
    before = sessions.get(session).heartbeat_at
    assert before > 0
    sessions.finish(session, "errored", "why")
    sessions.finish(session, "success", None)
    assert sessions.heartbeat(session, other) == {session: False, other: True}
    ended = sessions.get(session)
    assert ended.heartbeat_at == before
    assert (ended.finish_reason, ended.finish_detail) == ("errored", "why")
    with pytest.raises(InvalidInput, match="session_id"):
        sessions.get_open(session)


def test_a_sampler_is_created_once(sessions):
    session = sessions.create(row())
    assert sessions.create_sampler(sampler(session)).created_at == sessions.create_sampler(sampler(session)).created_at
    with pytest.raises(InvalidInput, match="sampling_session_seq_id"):
        sessions.create_sampler(sampler(session, base="other"))
    assert sessions.sampler_for_work(f"{session}:sample:0").base_model == "m"
    sessions.finish(session, "success", None)
    with pytest.raises(InvalidInput, match="session_id"):
        sessions.sampler_for_work(f"{session}:sample:0")


def test_nothing_is_found_for_unknown_ids(sessions):
    for find in (sessions.get, sessions.model, sessions.model_for_work, sessions.sampler, sessions.sampler_for_work):
        with pytest.raises(NotFound):
            find("nobody")
    with pytest.raises(NotFound):
        sessions.finish("nobody", "success", None)
    with pytest.raises(NotFound):
        sessions.create_sampler(sampler("nobody"))


def test_a_checkpoint_is_found_until_it_expires(db, sessions):
    path = parse_path("tinker://s:train:0/weights/a")
    with writing(db) as session:
        session.add(model_row("s", 0))
        session.add(
            Checkpoint(model_id="s:train:0", kind="weights", name="a", folder="f", size_bytes=1, created_at=0.0)
        )
    checkpoint, model = sessions.checkpoint(path)
    assert (checkpoint.folder, model.rank) == ("f", 1)
    with writing(db) as session:
        session.get(Checkpoint, checkpoint.id).expires_at = now() - 1
    with pytest.raises(NotFound, match="path"):
        sessions.checkpoint(path)


def test_models_are_idle_when_their_session_is_over_or_silent(db, sessions):
    alive, silent, finished = (sessions.create(row()) for _ in range(3))
    sessions.heartbeat(alive)
    sessions.heartbeat(finished)
    with writing(db) as session:
        for session_id in (alive, silent, finished):
            for number in range(2):
                session.add(model_row(session_id, number))
        session.get(Session, silent).heartbeat_at = 50.0
    sessions.finish(finished, "success", None)
    asked = [f"{session_id}:train:0" for session_id in (alive, silent, finished)]
    assert set(sessions.idle_models(asked, before=60.0)) == set(asked[1:])
    assert sessions.idle_models(asked, before=50.0) == [asked[2]]
    assert sessions.idle_models([], before=60.0) == []


def test_listing(sessions):
    made = [sessions.create(row()) for _ in range(3)]
    assert sorted(sessions.recent(10, 0)) == sorted(made)
    assert len(sessions.recent(2, 2)) == 1
    sessions.create_sampler(sampler(made[0]))
    assert sessions.contents(made[0]) == ([], [f"{made[0]}:sample:0"])


def test_copies_of_a_client_that_join_at_the_same_time_get_numbers_of_their_own(db, sessions):
    sampler_id = sessions.create_sampler(sampler(sessions.create(row()))).sampler_id
    barrier, numbers = threading.Barrier(6), []

    def join() -> None:
        barrier.wait()
        for _ in range(5):
            numbers.append(Sessions(db).join_sampler(sampler_id))

    threads = [threading.Thread(target=join) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(numbers) == list(range(1, 31))


def test_nobody_joins_a_sampler_whose_session_is_finished(sessions):
    session_id = sessions.create(row())
    sampler_id = sessions.create_sampler(sampler(session_id)).sampler_id
    sessions.finish(session_id, "success", None)
    with pytest.raises(InvalidInput, match="session_id"):
        sessions.join_sampler(sampler_id)
    with pytest.raises(NotFound, match="sampling_session_id"):
        sessions.join_sampler("s:sample:9")


def test_heartbeats_of_many_owners_are_one_write_and_each_only_for_his_own(db):
    hers, his = (Sessions(db, lambda: 5.0, owner) for owner in ("alice", "bob"))
    a, b = hers.create(row()), his.create(row())
    both = Sessions(db, lambda: 9.0)
    beats = [(a, "alice"), (a, "bob"), (b, "alice"), ("nobody", "alice")]
    assert both.heartbeats(beats) == {(a, "alice"): True}
    assert (both.get(a).heartbeat_at, both.get(b).heartbeat_at) == (9.0, 0.0)
    assert hers.heartbeat(a, b) == {a: True}
    assert both.heartbeats([(a, None), (b, None)]) == {(a, None): True, (b, None): True}
