"""Spans to recorded logprobs: the worked example, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tx.errors import InvalidInput
from tx.tinker import recordings
from tx.tinker.db import RecordedSequence, now, open_database, reading, writing
from tx.types import (
    Datum,
    ForwardBackward,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
    Span,
)

PROMPT = [10, 11, 12]


def resolve(db, asked: ForwardBackward, session_id: str, **how: bool) -> ForwardBackward:
    return recordings.resolve(db, asked, session_id, usable_since=now() - recordings.USABLE_S, **how)


@pytest.fixture
def db(sqlite_url):
    db = open_database(sqlite_url)
    request = SampleRequest(np.array(PROMPT, np.int32), 1, SamplingParams())
    sequence = SampledSequence(np.array([20, 21, 22], np.int32), np.array([-1, -2, -3], np.float32), "length")
    with writing(db) as session:
        session.add_all(recordings.rows_of(7, "s", request, SampleResult([sequence])))
    return db


def request(targets: list[int], spans: list[Span], advantages: list[float], loss_fn="stable_reinforce"):
    inputs = {"target_tokens": np.array(targets, np.int64), "advantages": np.array(advantages, np.float32)}
    datum = Datum(np.zeros(len(targets), np.int32), inputs, input_spans=tuple(spans))
    return ForwardBackward("s:train:0", 1, (datum,), loss_fn, {}, False)


def test_the_worked_example(db):
    spans = [Span("7-0", 1, 2, False), Span("7-0", 0, 2, True)]
    resolved = resolve(db, request([11, 12, 20, 21], spans, [0, 0, 1, 1]), "s")
    inputs = resolved.data[0].inputs
    assert inputs["logprobs"].tolist() == [0, 0, -1, -2]
    assert inputs["recorded_mask"].tolist() == [0, 0, 1, 1]


def test_targets_under_a_prompt_span_are_not_compared(db):
    """The cookbook's rl_loop pads them with zeros: they carry no loss."""
    spans = [Span("7-0", 1, 2, False), Span("7-0", 0, 1, True)]
    resolved = resolve(db, request([0, 0, 20], spans, [0, 0, 1]), "s")
    assert resolved.data[0].inputs["logprobs"].tolist() == [0, 0, -1]


def test_a_span_may_start_anywhere_in_its_sequence(db):
    resolved = resolve(db, request([21, 22], [Span("7-0", 1, 2, True)], [1, 1]), "s")
    assert resolved.data[0].inputs["logprobs"].tolist() == [-2, -3]


def test_other_losses_ignore_spans(db):
    ppo = request([1], [Span("nobody", 0, 1, True)], [1], loss_fn="ppo")
    assert resolve(db, ppo, "s") is ppo


@pytest.mark.parametrize(
    ("targets", "spans", "advantages", "words"),
    [
        ([20, 21], [Span("8-0", 0, 2, True)], [1, 1], r"loss_fn_input_spans\[0\]\.sequence_id.*8-0"),
        ([20, 99], [Span("7-0", 0, 2, True)], [1, 1], "the tokens of sequence 7-0"),
        ([0, 0], [Span("7-0", 2, 2, False)], [0, 0], "at most 3 of sequence 7-0"),
        ([20, 21], [Span("7-0", 2, 2, True)], [1, 1], "at most 3 of sequence 7-0"),
        ([20, 21], [Span("7-0", 0, 1, True)], [1, 0], "tile the 2 target tokens"),
        ([12, 20], [Span("7-0", 2, 1, False), Span("7-0", 0, 1, True)], [1, 1], "advantages.*position 0"),
    ],
)
def test_what_does_not_match_is_refused_by_name(db, targets, spans, advantages, words):
    with pytest.raises(InvalidInput, match=r"^data\[0\].*" + words):
        resolve(db, request(targets, spans, advantages), "s")


def test_recordings_belong_to_a_session_and_are_kept_a_day_after_their_last_use(db):
    good = request([20], [Span("7-0", 0, 1, True)], [1])
    with pytest.raises(InvalidInput, match="7-0"):
        resolve(db, good, "another session")

    def set_used(age_s: float) -> None:
        with writing(db) as session:
            session.get(RecordedSequence, "7-0").used_at = now() - age_s

    set_used(recordings.USABLE_S - 60)
    resolve(db, good, "s")
    with reading(db) as session:
        assert session.get(RecordedSequence, "7-0").used_at > now() - 60
    set_used(recordings.USABLE_S + 60)
    with pytest.raises(InvalidInput, match="7-0"):
        resolve(db, good, "s")
    assert resolve(db, good, "s", replaying=True).data[0].inputs["logprobs"].tolist() == [-1]
    recordings.prune(db, now() - recordings.KEPT_S)
    resolve(db, good, "s", replaying=True)
    recordings.prune(db, now())
    with pytest.raises(InvalidInput, match="7-0"):
        resolve(db, good, "s", replaying=True)
