"""What the server itself sampled, kept so that ``stable_reinforce`` need not trust logprobs that a client sends.

A sample with ``record_stability_info`` leaves one row per sequence. A training datum names those sequences in its
provenance spans; ``resolve`` turns the spans into the loss's two inputs: ``logprobs`` (q) and ``recorded_mask``.

Example: targets ``[p1 p2 s0 s1]`` with spans prompt("7-0", offset 1, length 2), sampled("7-0", offset 0, length 2) give
mask ``[0 0 1 1]`` and q ``[0 0 q0 q1]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from sqlalchemy import delete, update
from sqlalchemy.engine import Engine as Database
from sqlmodel import col, select

from tx import loss_specs
from tx.errors import InvalidInput, NotFound
from tx.tinker.db import RecordedSequence, now, reading, writing
from tx.tinker.wire.paths import sample_sequence_id
from tx.types import Datum, ForwardBackward, SampleRequest, SampleResult, Span

USABLE_S = 86400.0
"""A recording may be used for a day; each use starts the day again."""

TOUCH_EVERY_S = 3600.0
"""A use is written down at most this often: a write per training request would cost more than it tells."""

KEPT_S = 30 * USABLE_S
"""Rows outlive their use: a recovery may replay a job that used them."""

_IDS_PER_QUERY = 500
"""SQLite bounds the variables of one statement."""


def rows_of(request_id: int, session_id: str, request: SampleRequest, result: SampleResult) -> list[RecordedSequence]:
    """The rows to commit with a sample's result."""
    return [
        RecordedSequence(
            sequence_id=sample_sequence_id(request_id, j),
            session_id=session_id,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
            prompt=np.asarray(request.prompt, "<i4").tobytes(),
            used_at=now(),
        )
        for j, sequence in enumerate(result.sequences)
    ]


def resolve(
    db: Database, request: ForwardBackward, session_id: str, *, usable_since: float, replaying: bool = False
) -> ForwardBackward:
    """The request with q and its mask filled in; requests of other losses come back as they are.

    Args:
        usable_since: a recording last used before then (UTC seconds since the epoch) is too old.

    Raises:
        InvalidInput: a span that names no usable recording of this session, or other tokens than it recorded. A
            ``replaying`` caller was answered when the recording was usable, so then its age doesn't matter.
    """
    spec = loss_specs.LOSSES.get(request.loss_fn)
    if spec is None or not spec.needs_spans:
        return request
    names = {span.sequence_id for datum in request.data for span in datum.input_spans}
    found = _look_up(db, names, session_id, not_before=0.0 if replaying else usable_since)
    data = tuple(_resolve_datum(datum, f"data[{i}]", found) for i, datum in enumerate(request.data))
    if not replaying:
        _touch(db, [name for name, row in found.items() if row.used_at < now() - TOUCH_EVERY_S])
    return replace(request, data=data)


def prune(db: Database, before: float) -> None:
    """Delete the recordings last used before then."""
    with writing(db) as session:
        session.exec(delete(RecordedSequence).where(col(RecordedSequence.used_at) < before))


def _look_up(db: Database, names: Iterable[str], session_id: str, not_before: float) -> dict[str, RecordedSequence]:
    ordered = sorted(names)
    found: dict[str, RecordedSequence] = {}
    with reading(db) as session:
        for start in range(0, len(ordered), _IDS_PER_QUERY):
            query = select(RecordedSequence).where(
                col(RecordedSequence.sequence_id).in_(ordered[start : start + _IDS_PER_QUERY]),
                RecordedSequence.session_id == session_id,
                RecordedSequence.used_at >= not_before,
            )
            found.update({row.sequence_id: row for row in session.exec(query)})
    return found


def _touch(db: Database, names: list[str]) -> None:
    for start in range(0, len(names), _IDS_PER_QUERY):
        chosen = col(RecordedSequence.sequence_id).in_(names[start : start + _IDS_PER_QUERY])
        with writing(db) as session:
            session.exec(update(RecordedSequence).where(chosen).values(used_at=now()))


def _resolve_datum(datum: Datum, where: str, found: Mapping[str, RecordedSequence]) -> Datum:
    targets = datum.inputs.get("target_tokens")
    if targets is None or targets.ndim != 1:
        return datum  # the trainer refuses it by name
    where_spans = f"{where}.loss_fn_input_spans"
    covered = sum(span.length for span in datum.input_spans)
    if datum.input_spans and covered != targets.size:
        raise InvalidInput(where_spans, f"{covered} positions", f"spans that tile the {targets.size} target tokens")
    q, mask = np.zeros(targets.size, np.float32), np.zeros(targets.size, np.float32)
    position = 0
    for i, span in enumerate(datum.input_spans):
        here = slice(position, position + span.length)
        recorded = _recorded(span, f"{where_spans}[{i}]", found, targets[here])
        if span.sampled:
            q[here], mask[here] = recorded, 1.0
        position += span.length
    advantages = datum.inputs.get("advantages")
    if advantages is not None and advantages.shape == mask.shape and np.any(advantages[mask == 0]):
        position = int(np.flatnonzero((mask == 0) & (advantages != 0))[0])
        raise InvalidInput(
            f"{where}.loss_fn_inputs.advantages",
            f"{advantages[position]} at position {position}, which no sampled span covers",
            "0 wherever no recorded logprob is known",
        )
    return replace(datum, inputs={**datum.inputs, "logprobs": q, "recorded_mask": mask})


def _recorded(span: Span, where: str, found: Mapping[str, RecordedSequence], targets: np.ndarray) -> np.ndarray:
    """The recorded logprobs of one span (zeros for a prompt span), sampled tokens checked against the targets."""
    row = found.get(span.sequence_id)
    if row is None:
        raise NotFound(
            f"{where}.sequence_id",
            span.sequence_id,
            "a sequence of this session that was sampled with record_stability_info and used within the last day",
        )
    end = span.offset + span.length
    tokens = np.frombuffer(row.tokens if span.sampled else row.prompt, "<i4")
    if end > tokens.size:
        raise InvalidInput(where, f"positions to {end}", f"at most {tokens.size} of sequence {span.sequence_id}")
    if not span.sampled:
        return np.zeros(span.length, np.float32)  # targets of a prompt carry no loss, so clients put anything there
    if not np.array_equal(tokens[span.offset : end], targets):
        raise InvalidInput(where, "other target tokens", f"the tokens of sequence {span.sequence_id}")
    return np.frombuffer(row.logprobs, "<f4")[span.offset : end]
