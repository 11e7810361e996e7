"""A session's jobs as a timeline: Chrome's trace format, which ui.perfetto.dev and chrome://tracing open.

One process per model and per sampler; in it one track per kind of job, with as many lines as jobs overlap. Each job is
a span from its request to its end, and in it lie ``queued`` (until an engine took it, or for samples until the worker
did) and ``running``. Times are microseconds since the epoch. It is written while it is read, a page of jobs at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.engine import Engine as Database
from sqlmodel import col

from tx.tinker.db import Job, now, reading

_PAGE = 1000

_COLUMNS = (
    Job.request_id, Job.kind, Job.model_id, Job.sampler_id, Job.seq_id, Job.status, Job.error, Job.tokens_in,
    Job.tokens_out, Job.tokens_cached, Job.num_sequences, Job.created_at, Job.claimed_at, Job.started_at,
    Job.finished_at,
)  # fmt: skip


def chrome_trace(db: Database, session_id: str) -> Iterator[str]:
    """The JSON text of a session's trace in pieces, each a few jobs; what is not finished lasts until now."""
    # Viewers tell the format by the first two characters.
    yield '{"traceEvents":['
    processes: dict[str, int] = {}
    separator = ""
    for page in _pages(db, session_id):
        events = [event for job in page for event in _events(job, processes)]
        yield separator + ",".join(json.dumps(event, separators=(",", ":")) for event in events)
        separator = ","
    yield f'],"displayTimeUnit":"ms","otherData":{json.dumps({"session_id": session_id})}}}'


def _pages(db: Database, session_id: str) -> Iterator[list[Row[Any]]]:
    after = 0
    while True:
        query = (
            select(*map(col, _COLUMNS))
            .where(col(Job.session_id) == session_id, col(Job.request_id) > after)
            .order_by(col(Job.request_id))
            .limit(_PAGE)
        )
        with reading(db) as session:
            page: list[Row[Any]] = list(session.connection().execute(query))
        if not page:
            return
        after = page[-1].request_id
        yield page


def _events(job: Row[Any], processes: dict[str, int]) -> Iterator[dict[str, Any]]:
    owner = job.model_id or job.sampler_id or "session"
    if owner not in processes:
        processes[owner] = len(processes) + 1
        yield {"ph": "M", "name": "process_name", "pid": processes[owner], "tid": 0, "args": {"name": owner}}
    # Whatever the wall clock did meanwhile, nothing lasts less than no time.
    ends = max(job.finished_at or now(), job.created_at)
    starts = max(min(job.started_at or job.claimed_at or ends, ends), job.created_at)
    told = {
        key: getattr(job, key)
        for key in ("seq_id", "status", "error", "tokens_in", "tokens_out", "tokens_cached", "num_sequences")
        if getattr(job, key) not in (None, 0)
    }
    told["request_id"] = str(job.request_id)
    common = {"cat": job.kind, "id": job.request_id, "pid": processes[owner], "tid": 0}
    yield common | {"ph": "b", "name": job.kind, "ts": _us(job.created_at), "args": told}
    yield from _span(common, "queued", job.created_at, starts)
    if job.claimed_at is not None:
        yield from _span(common, "running", starts, ends)
    yield common | {"ph": "e", "name": job.kind, "ts": _us(ends)}


def _span(common: dict[str, Any], name: str, starts: float, ends: float) -> Iterator[dict[str, Any]]:
    yield common | {"ph": "b", "name": name, "ts": _us(starts)}
    yield common | {"ph": "e", "name": name, "ts": _us(ends)}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
