"""Usage is added up from the job table and the checkpoints, on both databases."""

from __future__ import annotations

import pytest

from tx.tinker import usage
from tx.tinker.db import Checkpoint, Job, Model, Sampler, Session, open_database, writing
from tx.tinker.pruning import prune
from tx.tinker.usage import HOUR_S, Prices

T0 = 500_000 * HOUR_S
"""A full hour."""

GB = 10**9
NOBODY_PAYS = Prices()


@pytest.fixture
def db(database_url):
    database = open_database(database_url)
    with writing(database) as session:
        for name, project in (("s1", "p1"), ("s2", None)):
            session.add(
                Session(session_id=name, created_at=0, heartbeat_at=0, project_id=project, user_metadata={"name": name})
            )
            session.add(
                Model(
                    model_id=f"{name}:train:0", session_id=name, model_seq_id=0, base_model="/folder",
                    served_name="org/name", rank=4, seed=0, created_at=0, last_request_at=0,
                )
            )  # fmt: skip
    yield database
    database.dispose()


def job(kind: str, at: float, session: str = "s1", status: str = "done", **values) -> Job:
    values = {"base_model": "/folder", "model_id": f"{session}:train:0"} | values
    return Job(kind=kind, session_id=session, status=status, created_at=T0 - 9, finished_at=at, **values)


def store(db, *rows) -> None:
    with writing(db) as session:
        for row in rows:
            session.add(row)


def found(db, hours: int = 1, prices: Prices = NOBODY_PAYS, now_s: float = T0 + 100 * HOUR_S) -> list[tuple]:
    """(hour, session, type, quantity) of every event."""
    events = usage.events(db, T0, T0 + hours * HOUR_S, prices, now_s)
    listed = []
    for event in events:
        info = event.event_info
        quantity = {"checkpoint": "count", "storage": "gigabyte_hours"}.get(info.type, "token_count")
        kind = "cached" if getattr(info, "cached", False) else info.type
        hour = (event.bucket_start.timestamp() - T0) / HOUR_S
        assert (event.bucket_end - event.bucket_start).total_seconds() == HOUR_S
        listed.append((hour, event.session_id, kind, getattr(info, quantity)))
    return listed


def test_tokens_are_added_up_by_hour_session_and_kind(db):
    store(
        db,
        job("forward_backward", T0, tokens_in=100),
        job("forward", T0 + 0.5, tokens_in=20),
        job("forward_backward", T0 + HOUR_S - 0.001, tokens_in=3),
        job("forward_backward", T0 + HOUR_S, tokens_in=4000),
        job("forward_backward", T0 + 1, session="s2", tokens_in=50),
        job("sample", T0 + 2, model_id=None, sampler_id="s1:sample:0", tokens_in=30, tokens_cached=19, tokens_out=7),
        job("sample", T0 + 3, model_id=None, sampler_id="s1:sample:0", tokens_in=10, tokens_out=70),
        job("optim_step", T0 + 4, tokens_in=99),
        job("create_model", T0 + 4),
    )
    first_hour = [
        (0, "s1", "training", 123),
        (0, "s1", "sampling_sample", 77),
        (0, "s2", "training", 50),
        (0, "s1", "sampling_prefill", 21),
        (0, "s1", "cached", 19),
    ]
    assert found(db) == first_hour
    assert found(db, 2) == [*first_hour, (1, "s1", "training", 4000)]


def test_only_what_went_well_inside_the_window_counts(db):
    store(
        db,
        job("forward_backward", T0 + 1, status="failed", tokens_in=1),
        job("forward_backward", T0 - 0.001, tokens_in=2),
        job("forward_backward", T0 + HOUR_S, tokens_in=3),
        Job(kind="sample", session_id="s1", base_model="b", status="running", created_at=T0, tokens_in=4),
    )
    assert found(db) == []


def test_usage_outlives_payloads_and_results(db):
    store(db, job("forward_backward", T0 + 1, tokens_in=100, payload=b"p", result=b"r", seq_id=1))
    store(db, job("sample", T0 + 1, model_id=None, tokens_in=9, tokens_out=8, payload=b"p", result=b"r"))
    before = found(db)
    assert prune(db, T0 + HOUR_S) == 3
    assert (
        found(db)
        == before
        == [(0, "s1", "training", 100), (0, "s1", "sampling_prefill", 9), (0, "s1", "sampling_sample", 8)]
    )


def test_usage_is_listed_under_the_name_and_the_project_that_the_client_knows(db):
    sampler = Sampler(
        sampler_id="s2:sample:0", session_id="s2", seq=0, base_model="/folder", served_name="org/other", kind="base",
        created_at=0,
    )  # fmt: skip
    store(
        db,
        sampler,
        job("forward_backward", T0, tokens_in=3),
        job("sample", T0, session="s2", model_id=None, sampler_id="s2:sample:0", tokens_out=2),
        job("sample", T0, session="gone", model_id=None, sampler_id="gone:sample:0", tokens_out=1),
    )
    events = usage.events(db, T0, T0 + HOUR_S, NOBODY_PAYS, T0 + HOUR_S)
    assert [(event.base_model, event.project_id) for event in events] == [
        ("org/name", "p1"),
        ("org/other", None),
        ("/folder", None),
    ]
    sessions = usage.user_metadata(db, [event.session_id for event in events])
    assert {name: session.user_metadata for name, session in sessions.items()} == {
        "s1": {"name": "s1"},
        "s2": {"name": "s2"},
    }


def test_named_saves_are_checkpoints_and_unnamed_snapshots_are_not(db):
    unnamed = job("save_weights_for_sampler", T0, request_id=700)
    sampler = Sampler(
        sampler_id="s1:sample:0", session_id="s1", seq=0, base_model="b", served_name="b", kind="snapshot",
        created_at=0, snapshot_id="s1:train:0@700",
    )  # fmt: skip
    store(db, unnamed, sampler, job("save_weights", T0), job("save_weights_for_sampler", T0, request_id=900))
    assert found(db) == [(0, "s1", "checkpoint", 2)]


def checkpoint(name: str, since: float, gigabytes: float, **values) -> Checkpoint:
    model_id = values.pop("model_id", "s1:train:0")
    values = {"folder": name, "kind": "weights"} | values
    return Checkpoint(model_id=model_id, name=name, size_bytes=int(gigabytes * GB), created_at=since, **values)


def test_storage_is_size_times_the_part_of_the_hour_that_it_was_there(db):
    store(
        db,
        checkpoint("whole", T0 - 5, 2),
        checkpoint("half", T0 + HOUR_S / 2, 4),
        checkpoint("quarter", T0 - 5, 8, expires_at=T0 + HOUR_S / 4),
        checkpoint("over", T0 - 9, 1000, expires_at=T0 - 5),
        checkpoint("later", T0 + 9 * HOUR_S, 1000),
    )
    assert found(db, 3) == [
        (0, None, "storage", 2 + 2 + 2),
        (1, None, "storage", 2 + 4),
        (2, None, "storage", 2 + 4),
    ]
    # Nothing is told of the future: an hour that has begun counts as far as it has gone.
    assert found(db, 3, now_s=T0 + HOUR_S * 1.5) == [(0, None, "storage", 6), (1, None, "storage", 3)]


def test_copies_share_their_bytes(db):
    store(db, checkpoint("a", T0, 2, folder="f", expires_at=T0 + HOUR_S / 2))
    store(db, checkpoint("b", T0 + HOUR_S / 4, 2, folder="f", model_id="s2:train:0"))
    assert found(db, 2) == [(0, None, "storage", 2), (1, None, "storage", 2)]
    early, late = T0 + HOUR_S / 4, T0 + HOUR_S
    storage = {item.project_id: item for item in usage.current_storage(db, NOBODY_PAYS, early)}
    assert (storage["p1"].checkpoint_count, storage["p1"].size_bytes) == (1, 2 * GB)
    assert (storage[None].checkpoint_count, storage[None].size_bytes) == (1, 0)
    (only,) = usage.current_storage(db, NOBODY_PAYS, late)
    assert (only.project_id, only.size_bytes) == (None, 2 * GB), "the first has expired, the copy has the bytes"


def test_storage_of_now_by_project(db):
    store(db, checkpoint("a", T0, 2), checkpoint("b", T0, 3.5, kind="sampler_weights"))
    store(db, checkpoint("c", T0, 1, model_id="s2:train:0"), checkpoint("d", T0, 9, expires_at=T0 + 1))
    prices = Prices(storage=0.1)
    one, other = usage.current_storage(db, prices, T0 + 2)
    assert (one.project_id, one.checkpoint_count, one.size_bytes) == ("p1", 2, int(5.5 * GB))
    assert (one.size_gigabytes, one.estimated_monthly_cost_usd) == (5.5, pytest.approx(0.55))
    assert (other.project_id, other.checkpoint_count, other.size_bytes) == (None, 1, GB)
    assert usage.current_storage(db, prices, T0 + 2, "p1") == [one]
    assert usage.current_storage(db, prices, T0 + 2, "p2") == []


def test_costs_are_rates_times_quantities(db):
    store(
        db,
        job("forward_backward", T0, tokens_in=2_000_000),
        job("sample", T0, model_id=None, tokens_in=1_500_000, tokens_cached=500_000, tokens_out=250_000),
        job("save_weights", T0),
        checkpoint("a", T0 - 9, 36),
    )
    prices = Prices(training=1.5, prefill=0.25, sample=4, storage=0.2)
    priced = {}
    for event in usage.events(db, T0, T0 + HOUR_S, prices, T0 + HOUR_S):
        name = event.event_info.type + ("+cached" if getattr(event.event_info, "cached", False) else "")
        priced[name] = (
            event.estimated_cost_usd,
            event.effective_rate_usd_per_million_tokens,
            event.effective_rate_usd_per_gigabyte_month,
        )
    assert priced == {
        "training": (3.0, 1.5, None),
        "sampling_prefill": (0.25, 0.25, None),
        "sampling_prefill+cached": (0.0, 0.0, None),
        "sampling_sample": (1.0, 4.0, None),
        "checkpoint": (None, None, None),
        "storage": (pytest.approx(0.01), None, 0.2),
    }
