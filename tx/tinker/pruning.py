"""What old jobs may forget: results that nobody will fetch any more, payloads that no recovery will replay."""

from __future__ import annotations

from typing import cast

from sqlalchemy import and_, func, or_, update
from sqlalchemy.engine import Engine as Database
from sqlalchemy.orm import aliased
from sqlmodel import col, select

from tx.tinker.db import UNFINISHED, Job, RecoveryPoint, Session, chunks, num_changed, reading, writing


def prune(db: Database, before: float) -> int:
    """Empty results of jobs finished before then, and payloads that no recovery needs; rows stay.

    Payloads of a model up to the seq of a recovery point which has a newer one behind it are free to go; without
    such a point all are needed, until the model's session has been finished for as long and has nothing left to do.
    Checkpoints don't count: their owner may delete them, or let them expire, whenever he likes. A load that may be
    replayed keeps its result, which tells whether its path still has the same weights.
    """
    finished = (col(Job.status).in_(("done", "failed")), col(Job.finished_at) < before)
    unfinished = aliased(Job)
    over = (
        select(col(Session.session_id))
        .where(Session.session_id == Job.session_id, col(Session.finished_at) < before)
        .where(
            ~select(unfinished.request_id)
            .where(unfinished.session_id == Session.session_id, col(unfinished.status).in_(UNFINISHED))
            .correlate(Session)
            .exists()
        )
        .correlate(Job)
        .exists()
    )
    newer = aliased(RecoveryPoint)
    superseded = (
        select(func.max(RecoveryPoint.seq_id))
        .where(RecoveryPoint.model_id == Job.model_id)
        .where(
            select(newer.seq_id)
            .where(col(newer.model_id) == Job.model_id, col(newer.seq_id) > col(RecoveryPoint.seq_id))
            .correlate(Job, RecoveryPoint)
            .exists()
        )
        .correlate(Job)
        .scalar_subquery()
    )
    needless = or_(
        col(Job.model_id).is_(None),
        col(Job.status) == "failed",
        col(Job.seq_id) <= superseded,
        over,
    )
    has_result = and_(col(Job.result).is_not(None), or_(col(Job.kind) != "load_weights", needless))
    has_payload = and_(col(Job.payload).is_not(None), needless)
    with reading(db) as session:  # the whole table is looked at, so nobody may have to wait for it
        ids = session.exec(select(Job.request_id).where(*finished, or_(has_result, has_payload))).all()
    results = payloads = 0
    for chunk in chunks(cast(list[int], ids)):
        these = col(Job.request_id).in_(chunk)
        with writing(db) as session:  # asked again: what a recovery starts from may have gone meanwhile
            results += num_changed(session, update(Job).where(these, *finished, has_result).values(result=None))
            payloads += num_changed(session, update(Job).where(these, *finished, has_payload).values(payload=None))
    return results + payloads
