"""List, delete and expire checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from sqlalchemy import func, or_
from sqlmodel import col, select

from tx.errors import NotFound
from tx.tinker.db import Checkpoint, Model, now, reading, writing
from tx.tinker.service import Api, Limit, Offset, Service, body
from tx.tinker.wire import requests, responses

router = APIRouter()


def _living() -> Any:
    return or_(col(Checkpoint.expires_at).is_(None), col(Checkpoint.expires_at) > now())


@router.get("/checkpoints", response_model_exclude_none=True)
def list_checkpoints(api: Api, limit: Limit = 20, offset: Offset = 0) -> responses.Checkpoints:
    """Of all models, newest first."""
    query = select(Checkpoint).where(_living())
    with reading(api.db) as db:
        total = db.exec(select(func.count()).select_from(query.subquery())).one()
        page = query.order_by(col(Checkpoint.created_at).desc(), col(Checkpoint.id).desc())
        rows = db.exec(page.limit(limit).offset(offset)).all()
    return responses.Checkpoints(
        checkpoints=[responses.checkpoint(row.model_dump()) for row in rows],
        cursor=responses.Cursor(offset=offset, limit=limit, total_count=total),
    )


@router.get("/training_runs/{model_id}/checkpoints", response_model_exclude_none=True)
@router.get("/models/{model_id}/checkpoints", response_model_exclude_none=True)  # SDK up to 0.3
def list_checkpoints_of(api: Api, model_id: str) -> responses.Checkpoints:
    """Of one model, oldest first, all of them."""
    query = select(Checkpoint).where(Checkpoint.model_id == model_id, _living()).order_by(col(Checkpoint.created_at))
    with reading(api.db) as db:
        if db.get(Model, model_id) is None:
            raise NotFound("training_run_id", model_id, "a training run of this server")
        rows = db.exec(query).all()
    return responses.Checkpoints(checkpoints=[responses.checkpoint(row.model_dump()) for row in rows])


@router.delete("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}")
def delete_checkpoint(api: Api, model_id: str, checkpoint_id: str) -> dict[str, str]:
    """Its row at once, then its files."""
    found = _find(api, model_id, checkpoint_id)
    with writing(api.db) as db:
        row = db.get(Checkpoint, found.id)
        if row is not None:
            db.delete(row)
    api.remove_folder(found)
    return {}


@router.put("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}/ttl")
def set_ttl(
    api: Api, model_id: str, checkpoint_id: str, request: Annotated[requests.SetTtl, body(requests.SetTtl)]
) -> dict[str, str]:
    """Seconds from now; null is never."""
    found = _find(api, model_id, checkpoint_id)
    with writing(api.db) as db:
        row = db.get(Checkpoint, found.id)
        if row is not None:
            row.expires_at = None if request.ttl_seconds is None else now() + request.ttl_seconds
    return {}


def _find(api: Service, model_id: str, checkpoint_id: str) -> Checkpoint:
    kind, _, name = checkpoint_id.partition("/")
    query = select(Checkpoint).where(
        Checkpoint.model_id == model_id, Checkpoint.kind == kind, Checkpoint.name == name, _living()
    )
    with reading(api.db) as db:
        row = db.exec(query).first()
    if row is None:
        raise NotFound("checkpoint_id", checkpoint_id, "a checkpoint of this training run")
    return row
