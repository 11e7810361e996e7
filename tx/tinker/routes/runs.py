"""Training runs: the models of this server, as the REST client lists them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy import func
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.errors import NotFound
from tx.tinker.db import Checkpoint, Job, Model, now, reading
from tx.tinker.service import Api, Limit, Offset
from tx.tinker.wire import responses

router = APIRouter()


@router.get("/training_runs", response_model_exclude_none=True)
def list_training_runs(api: Api, limit: Limit = 20, offset: Offset = 0) -> responses.TrainingRuns:
    """Newest first."""
    query = select(Model).where(Model.state != "failed")
    with reading(api.db) as db:
        total = db.exec(select(func.count()).select_from(query.subquery())).one()
        page = query.order_by(col(Model.created_at).desc(), Model.model_id).limit(limit).offset(offset)
        runs = _describe(db, db.exec(page).all())
    return responses.TrainingRuns(
        training_runs=runs, cursor=responses.Cursor(offset=offset, limit=limit, total_count=total)
    )


@router.get("/training_runs/{model_id}", response_model_exclude_none=True)
def get_training_run(api: Api, model_id: str) -> responses.TrainingRun:
    """One model."""
    with reading(api.db) as db:
        model = db.get(Model, model_id)
        if model is None:
            raise NotFound("training_run_id", model_id, "a training run of this server")
        return _describe(db, [model])[0]


def _describe(db: DbSession, models: Sequence[Model]) -> list[responses.TrainingRun]:
    ids = [model.model_id for model in models]
    last = select(Job.model_id, func.max(Job.created_at)).where(col(Job.model_id).in_(ids)).group_by(Job.model_id)
    last_request = dict(db.exec(last).all())
    checkpoints = select(Checkpoint).where(col(Checkpoint.model_id).in_(ids)).order_by(col(Checkpoint.created_at))
    newest: dict[tuple[str, str], responses.Checkpoint] = {}
    for row in db.exec(checkpoints).all():
        if row.expires_at is None or row.expires_at > now():
            newest[row.model_id, row.kind] = responses.checkpoint(row.model_dump())
    return [
        responses.TrainingRun(
            training_run_id=model.model_id,
            base_model=model.served_name,
            lora_rank=model.rank,
            last_request_time=responses.timestamp(last_request.get(model.model_id, model.last_request_at)),
            last_checkpoint=newest.get((model.model_id, "weights")),
            last_sampler_checkpoint=newest.get((model.model_id, "sampler_weights")),
            user_metadata=model.user_metadata or None,
        )
        for model in models
    ]
