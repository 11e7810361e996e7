"""List, publish, limit in time and delete checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from tx.tinker.openapi import refuses
from tx.tinker.service import Api, CheckpointId, Limit, ModelId, Offset, body
from tx.tinker.wire import compat, paths, requests, responses

router = APIRouter()


def _listed_kinds(http: Request) -> Collection[str]:
    return [kind for kind in paths.PATH_KINDS if kind != "external_weights" or compat.reads_external(http.headers)]


ListedKinds = Annotated[Collection[str], Depends(_listed_kinds)]
"""The kinds that this client can read in a listing."""


@router.get("/checkpoints", response_model_exclude_none=True)
def list_checkpoints(api: Api, kinds: ListedKinds, limit: Limit = 20, offset: Offset = 0) -> responses.Checkpoints:
    """Of all models, newest first."""
    rows, total = api.checkpoints.page(limit, offset, kinds)
    return responses.Checkpoints(
        checkpoints=[responses.checkpoint(row.model_dump()) for row in rows],
        cursor=responses.Cursor(offset=offset, limit=limit, total_count=total),
    )


@router.get("/training_runs/{model_id}/checkpoints", response_model_exclude_none=True, responses=refuses(404))
@router.get(
    "/models/{model_id}/checkpoints",
    response_model_exclude_none=True,
    responses=refuses(404),
    name="list_checkpoints_of_model",
)
def list_checkpoints_of(api: Api, kinds: ListedKinds, model_id: ModelId) -> responses.Checkpoints:
    """Of one model, oldest first, all of them. Only SDKs up to 0.3 say model for training run."""
    rows = api.checkpoints.of_model(model_id, kinds)
    return responses.Checkpoints(checkpoints=[responses.checkpoint(row.model_dump()) for row in rows])


# The paths that end in a verb come first: a checkpoint id is a path, and takes what is left.
@router.post("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}/publish", responses=refuses(404))
def publish_checkpoint(api: Api, model_id: ModelId, checkpoint_id: CheckpointId) -> responses.Empty:
    """200 for one that is public already: clients retry a 409 for minutes (protocol §1.6)."""
    api.checkpoints.publish(model_id, checkpoint_id, public=True)
    return responses.Empty()


@router.delete("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}/publish", responses=refuses(404))
def unpublish_checkpoint(api: Api, model_id: ModelId, checkpoint_id: CheckpointId) -> responses.Empty:
    """Private again; it may be so already."""
    api.checkpoints.publish(model_id, checkpoint_id, public=False)
    return responses.Empty()


@router.put("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}/ttl", responses=refuses(404))
def set_ttl(
    api: Api, model_id: ModelId, checkpoint_id: CheckpointId, request: Annotated[requests.SetTtl, body(requests.SetTtl)]
) -> responses.Empty:
    """Seconds from now; null is never."""
    api.checkpoints.set_ttl(model_id, checkpoint_id, request.ttl_seconds)
    return responses.Empty()


@router.delete("/training_runs/{model_id}/checkpoints/{checkpoint_id:path}", responses=refuses(404))
def delete_checkpoint(api: Api, model_id: ModelId, checkpoint_id: CheckpointId) -> responses.Empty:
    """Its row at once, then its files, unless a copy shares them."""
    last = api.checkpoints.delete(model_id, checkpoint_id)
    if last is not None:
        api.remove_folder(last)
    return responses.Empty()
