"""Telemetry is kept within its bounds whatever comes, on both databases."""

from __future__ import annotations

import json
import threading

import pytest

from tx.tinker import telemetry
from tx.tinker.telemetry import MAX_EVENT_BYTES, MAX_OF_BATCH, newest


def report(*events, session: str = "s", **batch) -> bytes:
    return json.dumps({"events": list(events), "session_id": session} | batch).encode()


def keep(db, body: bytes) -> telemetry.Batch:
    batch = telemetry.read(body)
    telemetry.keep(db, batch)
    return batch


def numbered(*numbers: int) -> list[dict]:
    return [{"event": "GENERIC_EVENT", "n": number} for number in numbers]


def numbers(db, session: str | None) -> list[int]:
    return [row.event["n"] for row in newest(db, session, 1000)]


def test_an_event_is_kept_as_it_came_with_what_its_batch_says(db):
    event = {"event": "GENERIC_EVENT", "severity": "ERROR", "event_data": {"a": [1, None, "ü"]}}
    keep(db, report(event, sdk_version="0.38.0", platform="Linux", process_uuid="u", session="sessionless-1"))
    (row,) = newest(db, "sessionless-1", 10)
    assert row.event == event | {"sdk_version": "0.38.0", "platform": "Linux", "process_uuid": "u"}
    assert (row.session_id, row.severity) == ("sessionless-1", "ERROR")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b'{"events": 5}',
        b'{"events": [5, null, "x", []]}',
    ],
)
def test_what_is_no_report_leaves_nothing_and_raises_nothing(db, body):
    keep(db, body)
    assert newest(db, None, 10) == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"session_id": "a\\u0000b", "events": [{"event": "x\\u0000"}]}',
        b'{"session_id": "a\\ud800b", "events": [{"event": "\\ud800"}]}',
        b'{"session_id": "s", "events": [{"event": "x", "value": NaN, "other": -Infinity, "big": 1e999}]}',
        b'{"session_id": 5, "events": [{}]}',
        b'{"events": [{"event": {"deep": []}, "severity": ["ERROR"]}]}',
        b'{"events": [{"event": 1, "n": 123456789012345678901234567890}]}',
    ],
)
def test_odd_events_are_kept_all_the_same(db, body):
    assert len(keep(db, body).events) == 1
    (row,) = newest(db, None, 10)
    assert row.severity == "INFO"
    assert telemetry.kind_of(row.event) == "other"


def test_a_session_keeps_its_newest_and_takes_nobody_elses_place(db, monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_OF_SESSION", 5)
    keep(db, report(*numbered(100), session="other"))
    for start in range(0, 12, 3):
        keep(db, report(*numbered(start, start + 1, start + 2)))
    assert numbers(db, "s") == [11, 10, 9, 8, 7]
    assert numbers(db, "other") == [100]


def test_many_sessions_share_one_bound(db, monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_EVENTS", 7)
    for session in range(10):
        keep(db, report(*numbered(2 * session, 2 * session + 1), session=f"s{session}"))
    assert numbers(db, None) == [19, 18, 17, 16, 15, 14, 13]
    assert numbers(db, "s0") == []


def test_floods_at_the_same_time_end_within_the_bounds(db, monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_OF_SESSION", 6)
    monkeypatch.setattr(telemetry, "MAX_EVENTS", 10)
    failures = []

    def flood(session: str) -> None:
        try:
            for _ in range(10):
                keep(db, report(*numbered(1, 2, 3), session=session))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=flood, args=(f"s{n % 2}",)) for n in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert len(newest(db, None, 1000)) == 10
    assert len(newest(db, "s0", 1000)) <= 6


def test_of_a_batch_that_is_too_long_the_rest_is_dropped(db):
    batch = keep(db, report(*numbered(*range(MAX_OF_BATCH + 20)), "no event"))
    assert (len(batch.events), batch.num_dropped) == (MAX_OF_BATCH, 21)
    assert numbers(db, "s")[-1] == 0


def test_an_event_that_is_too_long_keeps_its_beginning_and_the_end_of_its_traceback(db):
    event = {
        "event": "UNHANDLED_EXCEPTION",
        "severity": "CRITICAL",
        "error_type": "ValueError",
        "error_message": "m" * 100_000,
        "traceback": "\u1234" * 100_000 + "the end",
        "event_data": {"x": "y" * 100_000},
    }
    keep(db, report(event))
    (row,) = newest(db, "s", 10)
    assert len(json.dumps(row.event)) <= MAX_EVENT_BYTES
    assert (row.event["error_type"], row.event["cut"], row.severity) == ("ValueError", True, "CRITICAL")
    assert row.event["traceback"].endswith("the end")
    assert "event_data" not in row.event


def test_every_known_field_at_its_longest_fits(db):
    names = [*telemetry._KEPT_OF_LONG, "traceback"]
    keep(db, report(dict.fromkeys(names, "ሴ" * 5000)))
    (row,) = newest(db, "s", 10)
    assert len(json.dumps(row.event)) <= MAX_EVENT_BYTES
