"""forward, forward_backward and optim_step: append, and nothing else."""

from __future__ import annotations

from typing import Annotated, NoReturn

from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool

from tx.errors import InvalidInput, Unsupported
from tx.tinker.jobs import NewJob
from tx.tinker.openapi import describes_body, refuses
from tx.tinker.service import Api, Service, body, fingerprint, payload_of
from tx.tinker.wire import codec, compat, requests, responses, results

router = APIRouter()


@router.post("/forward", response_model_exclude_none=True, responses=refuses(404, 429), name="forward")
@router.post("/forward_backward", response_model_exclude_none=True, responses=refuses(404, 429))
@describes_body(results.TrainingBody, protobuf="ForwardBackwardRequest")
async def forward_backward(
    api: Api,
    http: Request,
    content_encoding: Annotated[str | None, Header(description="`zstd` for a compressed body.")] = None,
) -> responses.Future:
    """The body is stored as the bytes that came; only its header is read here."""
    content = await http.body()
    media_type = compat.media_type(http.headers.get("content-type"))
    job = await run_in_threadpool(_forward_backward, api, content, media_type, content_encoding)
    return responses.Future(request_id=str(await api.appender.append(job)), model_id=job.model_id)


@router.post("/optim_step", response_model_exclude_none=True, responses=refuses(404, 429))
async def optim_step(api: Api, request: Annotated[requests.OptimStep, body(requests.OptimStep)]) -> responses.Future:
    """One step of the model's optimizer on the gradients accumulated so far."""
    model = await run_in_threadpool(api.sessions.model_for_work, request.model_id)
    error = None
    if request.optimizer_params is not None and request.optimizer_params.type != "adamw":
        error = str(InvalidInput("optimizer_params.type", request.optimizer_params.type, '"adamw"'))
    payload = payload_of(request)
    job = NewJob(
        kind="optim_step",
        base_model=model.base_model,
        session_id=model.session_id,
        model_id=model.model_id,
        seq_id=request.seq_id,
        payload=payload,
        fingerprint=fingerprint(payload),
        error=error,
    )
    return responses.Future(request_id=str(await api.appender.append(job)), model_id=model.model_id)


@router.post("/create_custom_loss", status_code=400, response_model=responses.Problem)
def create_custom_loss(
    request: Annotated[requests.CreateCustomLoss, body(requests.CreateCustomLoss)],
) -> NoReturn:
    """Refused by name: the SDK asks only where client/config says so, and computes custom losses itself otherwise."""
    raise Unsupported(
        "name",
        request.name,
        "no losses that the server computes from a graph; forward_backward_custom computes any loss on the client",
    )


def _forward_backward(api: Service, content: bytes, media_type: str, encoding: str | None) -> NewJob:
    if media_type not in (codec.PROTOBUF, codec.JSON):
        raise InvalidInput("Content-Type", media_type, f"{codec.PROTOBUF} or {codec.JSON}")
    header = codec.read_forward_backward_header(content, media_type, encoding)
    model = api.sessions.model_for_work(header.model_id)
    return NewJob(
        kind="forward" if header.forward_only else "forward_backward",
        base_model=model.base_model,
        session_id=model.session_id,
        model_id=model.model_id,
        seq_id=header.seq_id,
        payload=content,
        payload_type=media_type,
        payload_encoding=encoding,
        # Not a digest of the bytes: a retry may write a protobuf map in another order.
        fingerprint=f"{header.num_tokens} tokens",
        tokens_in=header.num_tokens,
    )
