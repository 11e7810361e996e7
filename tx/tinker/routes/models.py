"""Create, describe and unload models. A model exists from its creation's append on; the engine makes it ready."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from tx.errors import InvalidInput, NotFound
from tx.tinker.db import Model, now
from tx.tinker.jobs import NewJob
from tx.tinker.openapi import refuses
from tx.tinker.service import Api, Service, body, fingerprint, payload_of
from tx.tinker.wire import paths, requests, responses

router = APIRouter()


@router.post("/create_model", response_model_exclude_none=True, responses=refuses(404, 429))
async def create_model(
    api: Api, request: Annotated[requests.CreateModel, body(requests.CreateModel)]
) -> responses.Future:
    """Its result says the model's id, which the reply can already tell."""
    job = await run_in_threadpool(_creation, api, request)
    return responses.Future(request_id=str(await api.appender.append(job)), model_id=job.model_id)


@router.post("/get_info", response_model_exclude_none=True, responses=refuses(404))
def get_info(api: Api, request: Annotated[requests.ModelRequest, body(requests.ModelRequest)]) -> responses.ModelInfo:
    """Asked for by clients right after creation: it names the tokenizer."""
    model = api.sessions.model(request.model_id)
    if model.state == "failed":
        raise NotFound("model_id", request.model_id, "a model whose creation went well")
    engine = api.engine(model.base_model)
    tokenizer = engine.tokenizer if engine is not None else ""
    return responses.ModelInfo(
        model_id=model.model_id,
        model_data=responses.ModelData(model_name=model.served_name, tokenizer_id=tokenizer or model.base_model),
        lora_rank=model.rank,
        model_name=model.served_name,
        optimizer_config=model.optimizer,
    )


@router.post("/unload_model", response_model_exclude_none=True, responses=refuses(404, 429))
async def unload_model(
    api: Api, request: Annotated[requests.ModelRequest, body(requests.ModelRequest)]
) -> responses.Future:
    """Only SDKs before 0.26 ask for it; it takes its turn behind the model's other jobs."""
    model = await run_in_threadpool(api.sessions.model_for_work, request.model_id)
    job = NewJob(
        kind="unload_model",
        base_model=model.base_model,
        session_id=model.session_id,
        model_id=model.model_id,
        payload=payload_of(request),
    )
    return responses.Future(request_id=str(await api.appender.append(job)), model_id=model.model_id)


def _creation(api: Service, request: requests.CreateModel) -> NewJob:
    session = api.sessions.get_open(request.session_id)
    retry_key = fingerprint(payload_of(request))
    seed = request.lora_config.seed
    if seed is None:
        seed = secrets.randbits(31)  # drawn here and stored, so that a recovery creates the same weights
        request.lora_config = request.lora_config.model_copy(update={"seed": seed})
    base_model = api.canonical(request.base_model)
    optimizer = request.optimizer_config
    error: InvalidInput | None = None
    if base_model is None:
        accepted = "one of " + ", ".join(api.served_models())
        error = InvalidInput("base_model", request.base_model, accepted)
    elif optimizer is not None and optimizer.type != "adamw":
        error = InvalidInput("optimizer_config.type", optimizer.type, '"adamw"')
    created, lora = now(), request.lora_config
    model = Model(
        model_id=paths.model_id(session.session_id, request.model_seq_id),
        session_id=session.session_id,
        model_seq_id=request.model_seq_id,
        base_model=base_model or request.base_model,
        served_name=request.base_model,
        rank=lora.rank,
        seed=seed,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
        optimizer=optimizer.model_dump() if optimizer is not None else None,
        user_metadata=request.user_metadata,
        created_at=created,
        last_request_at=created,
        state="failed" if error is not None else "pending",
    )
    return NewJob(
        kind="create_model",
        base_model=model.base_model,
        session_id=session.session_id,
        model_id=model.model_id,
        seq_id=0,
        payload=payload_of(request),
        fingerprint=retry_key,
        rows=(model,),
        error=str(error) if error is not None else None,
    )
