"""Training runs: the models of this server, as the REST client lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import ColumnElement, func, or_
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.errors import NotFound
from tx.tinker import owners
from tx.tinker.checkpoint_rows import living
from tx.tinker.db import LOCAL, Checkpoint, Job, Model, Session, reading
from tx.tinker.openapi import refuses
from tx.tinker.service import AccessScope, Api, Limit, ModelId, Offset, Service
from tx.tinker.wire import responses

router = APIRouter()


@router.get("/training_runs", response_model_exclude_none=True)
def list_training_runs(
    api: Api,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: Annotated[str | None, Query(description="Empty: the runs that are in no project.")] = None,
) -> responses.TrainingRuns:
    """Newest first; of one project, those of its sessions, and an empty ``project_id`` is no project."""
    query = select(Model).where(Model.state != "failed", _listed(api, access_scope))
    if project_id is not None:
        in_project = select(Session.session_id).where(func.coalesce(col(Session.project_id), "") == project_id)
        query = query.where(col(Model.session_id).in_(in_project))
    with reading(api.db) as db:
        total = db.exec(select(func.count()).select_from(query.subquery())).one()
        page = query.order_by(col(Model.created_at).desc(), Model.model_id).limit(limit).offset(offset)
        runs = _describe(db, db.exec(page).all(), api.clock(), api.caller.owner)
    return responses.TrainingRuns(
        training_runs=runs, cursor=responses.Cursor(offset=offset, limit=limit, total_count=total)
    )


@router.get("/training_runs/{model_id}", response_model_exclude_none=True, responses=refuses(404))
def get_training_run(api: Api, model_id: ModelId, access_scope: AccessScope = "owned") -> responses.TrainingRun:
    """One model, also one that could not be created."""
    with reading(api.db) as db:
        model = db.exec(select(Model).where(Model.model_id == model_id, _listed(api, access_scope))).first()
        if model is None:
            raise NotFound("training_run_id", model_id, "a training run of this server")
        return _describe(db, [model], api.clock(), api.caller.owner)[0]


def _listed(api: Service, scope: AccessScope) -> ColumnElement[bool]:
    """Condition: the caller owns the model, or, where that counts, one of its checkpoints is published."""
    own = owners.session_of_owner(Model.session_id, api.caller.owner)
    if scope == "owned":
        return own
    public = select(Checkpoint.model_id).where(col(Checkpoint.public), living(api.clock()))
    return or_(own, col(Model.model_id).in_(public))


def _describe(db: DbSession, models: Sequence[Model], at: float, reader: str | None) -> list[responses.TrainingRun]:
    """As of ``at``, in UTC seconds, to one who sees of others' models only what is published (None: sees all)."""
    ids = [model.model_id for model in models]
    sessions = {model.session_id for model in models}
    owner = dict(db.exec(select(Session.session_id, Session.owner).where(col(Session.session_id).in_(sessions))).all())
    own = {model.model_id for model in models if reader is None or owner.get(model.session_id) == reader}
    last = select(Job.model_id, func.max(Job.created_at)).where(col(Job.model_id).in_(ids)).group_by(Job.model_id)
    last_request = dict(db.exec(last).all())
    checkpoints = select(Checkpoint).where(
        col(Checkpoint.model_id).in_(ids), living(at), or_(col(Checkpoint.public), col(Checkpoint.model_id).in_(own))
    )
    newest: dict[tuple[str, str], responses.Checkpoint] = {}
    for row in db.exec(checkpoints.order_by(col(Checkpoint.created_at), col(Checkpoint.id))).all():
        newest[row.model_id, row.kind] = responses.checkpoint(row.model_dump())
    corrupted = _corrupted(db, ids)
    return [
        responses.TrainingRun(
            training_run_id=model.model_id,
            base_model=model.served_name,
            model_owner=owner.get(model.session_id, LOCAL),
            corrupted=model.state == "failed" or model.model_id in corrupted,
            lora_rank=model.rank,
            last_request_time=responses.timestamp(last_request.get(model.model_id, model.last_request_at)),
            last_checkpoint=newest.get((model.model_id, "weights")),
            last_sampler_checkpoint=newest.get((model.model_id, "sampler_weights")),
            user_metadata=(model.user_metadata or None) if model.model_id in own else None,
        )
        for model in models
    ]


def _corrupted(db: DbSession, model_ids: Sequence[str]) -> set[str]:
    """Models whose last answered request, the client's own mistakes aside, failed by the server's fault.

    A model that is lost and can't be rebuilt fails all of its requests so; after any other failure the next request
    that goes well tells that the model is whole.
    """
    last = (
        select(func.max(Job.request_id))
        .where(
            col(Job.model_id).in_(model_ids),
            col(Job.finished_at).is_not(None),
            or_(col(Job.category).is_(None), col(Job.category) != "user"),
        )
        .group_by(col(Job.model_id))
    )
    query = select(Job.model_id).where(col(Job.request_id).in_(last), Job.category == "server")
    return {model_id for model_id in db.exec(query) if model_id is not None}
