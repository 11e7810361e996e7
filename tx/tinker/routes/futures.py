"""retrieve_future: hand out a finished job's bytes, or hold the request until there are some."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tx.errors import NotFound
from tx.tinker.db import Job, now
from tx.tinker.service import ALIVE_S, Api, Service, body
from tx.tinker.wire import codec, compat, requests, responses

router = APIRouter()

HOLD_S = 25.0
"""Clients cut a silent poll at 45 s and ask again at once after a 408 (protocol §2.5)."""

_FINISHED = ("done", "failed")


@router.post("/retrieve_future")
async def retrieve_future(
    api: Api, http: Request, request: Annotated[requests.RetrieveFuture, body(requests.RetrieveFuture)]
) -> Response:
    """The result as often as it is asked for, until it is pruned."""
    request_id = _parse_id(request.request_id)
    job: Job | None = None

    def is_finished() -> bool:
        nonlocal job
        job = api.jobs.get(request_id)
        return job is None or job.status in _FINISHED

    if await api.watcher.wait(request_id, HOLD_S, is_finished) and job is not None and job.status not in _FINISHED:
        await run_in_threadpool(is_finished)
    if job is None:
        raise NotFound("request_id", request.request_id, "a request of this server")
    if job.status not in _FINISHED:
        return await run_in_threadpool(_try_again, api, job)
    return await run_in_threadpool(_answer, job, compat.accepts_protobuf(http.headers))


@router.post("/cancel_future")
def cancel_future(api: Api, request: Annotated[requests.CancelFuture, body(requests.CancelFuture)]) -> dict[str, str]:
    """A job that has not started fails as cancelled; one that has goes on."""
    request_id = _parse_id(request.request_id)
    if api.jobs.get(request_id) is None:
        raise NotFound("request_id", request.request_id, "a request of this server")
    api.jobs.cancel(request_id)
    return {}


def _parse_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**31:
        raise NotFound("request_id", text, "a request of this server")
    return int(text)


def _answer(job: Job, protobuf: bool) -> Response:
    if job.status == "failed":
        category = "user" if job.category == "user" else "server"
        failure = responses.Failure(error=job.error or "", category=category, request_id=str(job.request_id))
        return JSONResponse(failure.model_dump())
    if job.result is None:
        raise HTTPException(410, f"request_id: the result of {job.request_id} was pruned; it is too old.")
    if job.result_type == codec.JSON:
        return Response(job.result, media_type=codec.JSON)
    if protobuf:
        return Response(job.result, media_type=codec.PROTOBUF)
    return Response(codec.encode_json(codec.to_json(job.result, job.result_type or "")), media_type=codec.JSON)


def _try_again(api: Service, job: Job) -> Response:
    engine = api.engine(job.base_model)
    reply = responses.TryAgain(request_id=str(job.request_id))
    if engine is None or engine.state != "ready" or now() - engine.heartbeat_at > ALIVE_S:
        reply.queue_state = "paused_capacity"
        reply.queue_state_reason = f"The engine of {job.base_model} is not ready."
    return JSONResponse(reply.model_dump(exclude_none=True), status_code=408)
