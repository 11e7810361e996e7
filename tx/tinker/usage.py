"""Who used how much: tokens, checkpoints and storage by UTC hour, added up by the database.

Tokens are columns of the job table that stay when payloads and results are pruned, so any past hour can be asked for.
A job counts once, when it went well, in the hour in which it finished. Storage is what the checkpoints of now have
taken up since they were saved: a checkpoint that was deleted leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, Integer, String, and_, case, cast, exists, func, literal, select
from sqlalchemy.engine import Engine as Database
from sqlalchemy.sql.elements import ColumnElement
from sqlmodel import col

from tx.tinker import owners
from tx.tinker.checkpoint_rows import living
from tx.tinker.db import Checkpoint, Job, Model, Sampler, Session, reading
from tx.tinker.wire import admin
from tx.tinker.wire.paths import KIND_OF_SAVE
from tx.tinker.wire.responses import timestamp

HOUR_S = 3600
BYTES_PER_GB = 10**9
HOURS_PER_MONTH = 720
"""Of a GB-month, as the protocol counts it."""

_TRAINING_KINDS = ("forward", "forward_backward")


@dataclass(frozen=True)
class Prices:
    """What a server's owner charges, in USD: per million tokens, and per GB-month of storage."""

    training: float = 0.0
    prefill: float = 0.0
    sample: float = 0.0
    storage: float = 0.0


def events(
    db: Database, start_s: int, end_s: int, prices: Prices, now_s: float, owner: str | None = None
) -> list[admin.UsageEvent]:
    """Usage between two full hours (UTC seconds), the owner's or everybody's, by hour, then the most tokens first.

    Prompt tokens that were in the cache cost nothing: nothing was computed for them.
    """
    tokens = _token_events(db, start_s, end_s, prices, owner)
    storage = _storage_events(db, start_s, end_s, prices, now_s, owner)
    return sorted([*tokens, *storage], key=_rank)


def user_metadata(db: Database, session_ids: Iterable[str]) -> dict[str, admin.UsageSession]:
    """What those of these sessions that are known have said of themselves."""
    wanted, found = sorted(set(session_ids)), {}
    with reading(db) as session:
        for start in range(0, len(wanted), 500):  # SQLite bounds the variables of one statement
            chunk = col(Session.session_id).in_(wanted[start : start + 500])
            query = select(col(Session.session_id), col(Session.user_metadata)).where(chunk)
            for session_id, metadata in session.connection().execute(query):
                found[session_id] = admin.UsageSession(user_metadata=metadata or None)
    return found


def current_storage(
    db: Database, prices: Prices, now_s: float, project_id: str | None = None, owner: str | None = None
) -> list[admin.StorageItem]:
    """What lies in storage now, by project; bytes that copies share count once, where they were first."""
    lives = living(now_s)
    first = select(func.min(Checkpoint.id)).where(lives).group_by(col(Checkpoint.folder))
    query = (
        select(
            col(Session.project_id),
            func.count(),
            func.sum(case((col(Checkpoint.id).in_(first), col(Checkpoint.size_bytes)), else_=0)),
        )
        .select_from(Checkpoint)
        .outerjoin(Model, col(Model.model_id) == col(Checkpoint.model_id))
        .outerjoin(Session, col(Session.session_id) == col(Model.session_id))
        .where(lives, owners.model_of_owner(Checkpoint.model_id, owner))
        .group_by(col(Session.project_id))
        .order_by(func.count().desc())
    )
    if project_id is not None:
        query = query.where(col(Session.project_id) == project_id)
    with reading(db) as session:
        rows = session.connection().execute(query).all()
    return [
        admin.StorageItem(
            project_id=project,
            checkpoint_count=count,
            size_bytes=int(size),
            size_gigabytes=int(size) / BYTES_PER_GB,
            estimated_monthly_cost_usd=int(size) / BYTES_PER_GB * prices.storage,
        )
        for project, count, size in rows
    ]


def _token_events(
    db: Database, start_s: int, end_s: int, prices: Prices, owner: str | None
) -> Iterator[admin.UsageEvent]:
    with reading(db) as session:
        query = _tokens_by_hour(start_s, end_s, session.get_bind().dialect.name, owner)
        rows = session.connection().execute(query).all()
    for row in rows:
        bucket: dict[str, Any] = _bucket(start_s, int(row.hour))
        bucket.update(base_model=row.base_model, session_id=row.session_id, project_id=row.project_id)
        for usage, price in (
            (admin.TrainingUsage(token_count=int(row.training)), prices.training),
            (admin.PrefillUsage(cached=False, token_count=int(row.prefill)), prices.prefill),
            (admin.PrefillUsage(cached=True, token_count=int(row.cached)), 0.0),
            (admin.SampleUsage(token_count=int(row.sampled)), prices.sample),
        ):
            if usage.token_count:
                yield admin.UsageEvent(
                    **bucket,
                    estimated_cost_usd=usage.token_count / 1e6 * price,
                    effective_rate_usd_per_million_tokens=price,
                    event_info=usage,
                )
        if row.checkpoints:
            yield admin.UsageEvent(**bucket, event_info=admin.CheckpointUsage(count=int(row.checkpoints)))


def _tokens_by_hour(start_s: int, end_s: int, dialect: str, owner: str | None) -> Any:
    """Columns hour (from 0), base_model (as its client calls it), session_id, project_id and the counts."""
    kind, hours = col(Job.kind), (col(Job.finished_at) - start_s) / HOUR_S
    # A snapshot without a name is no checkpoint: nothing was saved.
    snapshot_id = col(Job.model_id) + "@" + cast(col(Job.request_id), String)
    unnamed = exists().where(col(Sampler.session_id) == col(Job.session_id), col(Sampler.snapshot_id) == snapshot_id)
    job = (
        select(
            # SQLite may lack floor(), PostgreSQL rounds where SQLite truncates; nothing is negative here.
            cast(hours if dialect == "sqlite" else func.floor(hours), Integer).label("hour"),
            col(Job.session_id),
            col(Job.model_id),
            col(Job.sampler_id),
            col(Job.base_model),
            case((kind.in_(_TRAINING_KINDS), col(Job.tokens_in)), else_=0).label("training"),
            case((kind == "sample", col(Job.tokens_in) - col(Job.tokens_cached)), else_=0).label("prefill"),
            case((kind == "sample", col(Job.tokens_cached)), else_=0).label("cached"),
            case((kind == "sample", col(Job.tokens_out)), else_=0).label("sampled"),
            case((and_(kind.in_(KIND_OF_SAVE), ~unnamed), 1), else_=0).label("checkpoints"),
        )
        .where(
            col(Job.status) == "done",
            kind.in_((*_TRAINING_KINDS, *KIND_OF_SAVE, "sample")),
            col(Job.finished_at) >= start_s,
            col(Job.finished_at) < end_s,
            owners.session_of_owner(Job.session_id, owner),
        )
        .subquery()
        .c
    )
    served = select(
        job.hour,
        func.coalesce(col(Model.served_name), col(Sampler.served_name), job.base_model).label("base_model"),
        job.session_id,
        col(Session.project_id),
        job.training,
        job.prefill,
        job.cached,
        job.sampled,
        job.checkpoints,
    )
    served = served.outerjoin(Model, col(Model.model_id) == job.model_id)
    served = served.outerjoin(Sampler, col(Sampler.sampler_id) == job.sampler_id)
    row = served.outerjoin(Session, col(Session.session_id) == job.session_id).subquery().c
    by = (row.hour, row.base_model, row.session_id, row.project_id)
    counts = (row.training, row.prefill, row.cached, row.sampled, row.checkpoints)
    return select(*by, *(func.sum(count).label(count.name) for count in counts)).group_by(*by)


def _storage_events(
    db: Database, start_s: int, end_s: int, prices: Prices, now_s: float, owner: str | None
) -> Iterator[admin.UsageEvent]:
    with reading(db) as session:
        rows = session.connection().execute(_storage_by_hour(start_s, end_s, now_s, owner)).all()
    for row in rows:
        gigabyte_hours = float(row.byte_seconds) / BYTES_PER_GB / HOUR_S
        yield admin.UsageEvent(
            **_bucket(start_s, int(row.hour)),
            base_model=row.base_model,
            project_id=row.project_id,
            estimated_cost_usd=gigabyte_hours / HOURS_PER_MONTH * prices.storage,
            effective_rate_usd_per_gigabyte_month=prices.storage,
            event_info=admin.StorageUsage(gigabyte_hours=gigabyte_hours),
        )


def _storage_by_hour(start_s: int, end_s: int, now_s: float, owner: str | None) -> Any:
    """Columns hour (from 0), base_model, project_id, byte_seconds."""
    hour = select(literal(0, Integer).label("hour")).cte("hours", recursive=True)
    hour = hour.union_all(select(hour.c.hour + 1).where(start_s + (hour.c.hour + 1) * HOUR_S < end_s))
    # Copies share a folder: it is there from the first of them to the end of the last.
    expires = case((func.count(col(Checkpoint.expires_at)) == func.count(), func.max(Checkpoint.expires_at)))
    folder = (
        select(
            func.min(Checkpoint.id).label("first"),
            func.min(Checkpoint.created_at).label("since"),
            _least(func.coalesce(expires, now_s), literal(now_s, Float)).label("until"),
        )
        .group_by(col(Checkpoint.folder))
        .subquery()
        .c
    )
    opens = start_s + hour.c.hour * HOUR_S
    lasted = folder.until > folder.since  # a clock that was put back may say otherwise
    lasts = _least(folder.until, opens + HOUR_S) - _greatest(folder.since, opens)
    return (
        select(
            hour.c.hour,
            col(Model.served_name).label("base_model"),
            col(Session.project_id),
            func.sum(col(Checkpoint.size_bytes) * lasts).label("byte_seconds"),
        )
        .select_from(hour)
        .join(folder.first.table, and_(folder.since < opens + HOUR_S, folder.until > opens, lasted))
        .join(Checkpoint, col(Checkpoint.id) == folder.first)
        .outerjoin(Model, col(Model.model_id) == col(Checkpoint.model_id))
        .outerjoin(Session, col(Session.session_id) == col(Model.session_id))
        .where(owners.model_of_owner(Checkpoint.model_id, owner))
        .group_by(hour.c.hour, col(Model.served_name), col(Session.project_id))
    )


def _least(one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[Any]:
    """The databases have different names for it."""
    return case((one < other, one), else_=other)


def _greatest(one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[Any]:
    return case((one > other, one), else_=other)


def _bucket(start_s: int, hour: int) -> dict[str, Any]:
    opens = start_s + hour * HOUR_S
    return {"bucket_start": timestamp(opens), "bucket_end": timestamp(opens + HOUR_S)}


def _rank(event: admin.UsageEvent) -> tuple[Any, ...]:
    tokens = getattr(event.event_info, "token_count", 0)
    return event.bucket_start, -tokens, event.event_info.type, event.session_id or "", event.base_model or ""
