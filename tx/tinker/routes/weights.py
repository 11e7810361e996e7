"""Save, save for sampling and for others, load and copy weights; what a client must know of a checkpoint to load it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from tx.errors import InvalidInput
from tx.tinker import copies
from tx.tinker.db import Model, Sampler, now
from tx.tinker.jobs import NewJob
from tx.tinker.openapi import refuses
from tx.tinker.service import Api, IdempotencyKey, Service, body, fingerprint, payload_of
from tx.tinker.wire import compat, paths, requests, responses

router = APIRouter()


@router.post("/save_weights", response_model_exclude_none=True, responses=refuses(404, 429))
async def save_weights(
    api: Api, request: Annotated[requests.SaveWeights, body(requests.SaveWeights)]
) -> responses.Future:
    """A training checkpoint under ``weights/``."""
    model = await run_in_threadpool(api.sessions.model_for_work, request.model_id)
    return await _append(api, _job("save_weights", model, request, request.seq_id))


@router.post("/save_weights_for_sampler", response_model_exclude_none=True, responses=refuses(404, 429))
async def save_weights_for_sampler(
    api: Api, request: Annotated[requests.SaveWeightsForSampler, body(requests.SaveWeightsForSampler)]
) -> responses.Future:
    """Named: files under ``sampler_weights/``. Unnamed: a snapshot and the sampling session that is bound to it."""
    model = await run_in_threadpool(api.sessions.model_for_work, request.model_id)
    rows: tuple[Sampler, ...] = ()
    if request.sampling_session_seq_id is not None:
        seq = request.sampling_session_seq_id
        sampler = Sampler(
            sampler_id=paths.sampler_id(model.session_id, seq),
            session_id=model.session_id,
            seq=seq,
            base_model=model.base_model,
            served_name=model.served_name,
            kind=request.kind,
            created_at=now(),
        )
        rows = (sampler,)
    return await _append(api, _job("save_weights_for_sampler", model, request, request.seq_id, rows=rows))


@router.post("/save_weights_external", response_model_exclude_none=True, responses=refuses(404, 429))
async def save_weights_external(
    api: Api, request: Annotated[requests.SaveWeightsExternal, body(requests.SaveWeightsExternal)]
) -> responses.Future:
    """A PEFT folder under ``external_weights/``, to be taken away through signed URLs."""
    model = await run_in_threadpool(api.sessions.model_for_work, request.model_id)
    return await _append(api, _job("save_weights_external", model, request, request.seq_id))


@router.post("/copy_weights", responses=refuses(404))
def copy_weights(
    api: Api,
    request: Annotated[requests.CopyWeights, body(requests.CopyWeights)],
    x_idempotency_key: IdempotencyKey = None,
) -> responses.CopiedWeights:
    """Another path for a checkpoint, in a session or project of choice, without copying a byte.

    Of another's, one that is published. A weights access token is accepted and not looked at: it opens nothing.
    """
    path = copies.copy_checkpoint(
        api.db,
        copies.CopyRequest(
            source=paths.parse_path(request.source_path, "source_path", paths.PATH_KINDS),
            session_id=request.session_id,
            model_seq_id=request.model_seq_id or 0,
            project_id=request.destination_project_id,
            ttl_s=request.ttl_seconds,
            idempotency_key=x_idempotency_key,
            owner=api.caller.owner,
        ),
    )
    return responses.CopiedWeights(tinker_path=str(path))


@router.post("/load_weights", response_model_exclude_none=True, responses=refuses(404, 429))
async def load_weights(
    api: Api, http: Request, request: Annotated[requests.LoadWeights, body(requests.LoadWeights)]
) -> responses.Future:
    """Into an existing model, or, with session_id and model_seq_id, as the creation of a new one."""
    request = compat.complete_load_weights(request, http.headers)
    if request.creates_model:
        job = await run_in_threadpool(_create_via_load, api, request)
    else:
        job = await run_in_threadpool(_load, api, request)
    return await _append(api, job)


@router.post("/weights_info", response_model_exclude_none=True, responses=refuses(404))
def weights_info(
    api: Api, request: Annotated[requests.WeightsPath, body(requests.WeightsPath)]
) -> responses.WeightsInfo:
    """The LoRA shape of a checkpoint."""
    path = paths.parse_path(request.tinker_path, "tinker_path", paths.PATH_KINDS)
    _, model = api.sessions.checkpoint(path, "tinker_path")
    return responses.WeightsInfo(
        base_model=model.served_name,
        lora_rank=model.rank,
        train_unembed=model.train_unembed,
        train_mlp=model.train_mlp,
        train_attn=model.train_attn,
        optimizer_config=model.optimizer,
    )


async def _append(api: Service, job: NewJob) -> responses.Future:
    return responses.Future(request_id=str(await api.appender.append(job)), model_id=job.model_id)


def _job(kind: str, model: Model, request: Any, seq_id: int | None, **extra: Any) -> NewJob:
    payload = payload_of(request)
    return NewJob(
        kind=kind,
        base_model=model.base_model,
        session_id=model.session_id,
        model_id=model.model_id,
        seq_id=seq_id,
        payload=payload,
        fingerprint=fingerprint(payload),
        **extra,
    )


def _load(api: Service, request: requests.LoadWeights) -> NewJob:
    """Into a model that exists; a path that can't be one fails the job, another's checkpoint is not found."""
    model = api.sessions.model_for_work(request.model_id or "")
    error = None
    try:
        path = paths.parse_path(request.path)
    except InvalidInput as broken:
        error = str(broken)
    else:
        api.sessions.may_load(path)
    return _job("load_weights", model, request, request.seq_id, error=error)


def _create_via_load(api: Service, request: requests.LoadWeights) -> NewJob:
    """The load is seq 0 of the model that it creates; the LoRA shape comes from the checkpoint (protocol §2.2)."""
    session = api.sessions.get_open(request.session_id or "")
    model_seq_id = request.model_seq_id or 0
    created = now()
    model = Model(
        model_id=paths.model_id(session.session_id, model_seq_id),
        session_id=session.session_id,
        model_seq_id=model_seq_id,
        base_model=request.base_model or "",
        served_name=request.base_model or "",
        rank=0,
        seed=0,
        user_metadata=request.user_metadata,
        created_at=created,
        last_request_at=created,
        state="failed",
        source_path=request.path,
    )
    try:
        _copy_shape(api, request, model)
    except InvalidInput as error:
        return _job("load_weights", model, request, 0, rows=(model,), error=str(error))
    return _job("load_weights", model, request, 0, rows=(model,))


def _copy_shape(api: Service, request: requests.LoadWeights, model: Model) -> None:
    _, source = api.sessions.checkpoint(paths.parse_path(request.path))
    if request.base_model is not None and api.canonical(request.base_model) != source.base_model:
        raise InvalidInput("base_model", request.base_model, f"{source.base_model}, which the checkpoint is of")
    optimizer = request.optimizer_config
    if optimizer is not None and optimizer.type != "adamw":
        raise InvalidInput("optimizer_config.type", optimizer.type, '"adamw"')
    model.base_model, model.served_name = source.base_model, request.base_model or source.served_name
    model.rank, model.seed = source.rank, source.seed
    model.train_attn, model.train_mlp, model.train_unembed = source.train_attn, source.train_mlp, source.train_unembed
    model.optimizer = optimizer.model_dump() if optimizer is not None else source.optimizer
    model.state = "pending"
