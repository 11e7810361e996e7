"""Hand out a finished job's bytes, or hold the request until there are some; say which samples finished; cancel."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tx.errors import NotFound
from tx.tinker.jobs import Completion
from tx.tinker.openapi import binary, refuses
from tx.tinker.service import Api, Service, body
from tx.tinker.wire import codec, compat, requests, responses, results

router = APIRouter()

_FINISHED = ("done", "failed")

_SEQS_PER_CLONE = 10**9
"""Copies of a sampling client number their requests from multiples of this (protocol §2.4)."""


@router.post(
    "/retrieve_future",
    response_model=results.Result | responses.Failure,
    responses={
        200: binary(
            codec.PROTOBUF,
            "The result, or why there is none. A `ForwardBackwardOutput` or `SampleResponse` of tinker.proto where "
            "`Accept` names protobuf, JSON otherwise.",
        ),
        408: {
            "description": "Not finished yet: ask again at once. A Problem if the body did not arrive in time.",
            "model": responses.TryAgain | responses.Problem,
        },
        **refuses(404, 410),
    },
)
async def retrieve_future(
    api: Api, http: Request, request: Annotated[requests.RetrieveFuture, body(requests.RetrieveFuture)]
) -> Response:
    """The result as often as it is asked for, until it is pruned."""
    request_id = _parse_id(request.request_id)

    def is_finished() -> bool:
        return api.jobs.is_over(request_id)

    def answer() -> Response:
        job = api.jobs.answer(request_id)
        if job is None:
            raise NotFound("request_id", request.request_id, "a request of this server")
        if job.status not in _FINISHED:
            return _try_again(api, job)
        return _answer(job, compat.accepts_protobuf(http.headers))

    if not await asyncio.to_thread(is_finished):
        async with api.out_of_turn():
            await api.watcher.wait(request_id, api.hold_s, is_finished)
    # Not in the pool of all routes: a thousand futures that are answered at once must leave the others some of it.
    return await asyncio.to_thread(answer)


@router.post("/retrieve_futures", response_model_exclude_none=True, responses=refuses(404))
async def retrieve_futures(
    api: Api, request: Annotated[requests.RetrieveFutures, body(requests.RetrieveFutures)]
) -> responses.Completions:
    """One poll for all samples of a sampling session instead of one for each."""
    sampler_id, clone = request.target.sampling_session_id, request.target.cloned_sampler_id
    await run_in_threadpool(api.sessions.sampler, sampler_id)
    deadline = time.monotonic() + min(api.hold_s, api.hold_s if request.timeout is None else request.timeout)
    retrieved, cursor = set(request.retrieved_request_ids), request.prev_cursor
    found: list[Completion] = []

    def look() -> None:
        nonlocal cursor
        while not found and (page := api.jobs.completions(sampler_id, cursor)):
            cursor = page[-1].finish_seq
            found.extend(one for one in page if (one.seq_id or 0) // _SEQS_PER_CLONE == clone)

    def is_more() -> bool:
        return api.jobs.last_finished([sampler_id]).get(sampler_id, 0) > cursor

    await run_in_threadpool(look)
    # What other clones finish wakes us too: then look, and wait for the rest of the time.
    while not found and await api.watcher.wait((sampler_id, cursor), deadline - time.monotonic(), is_more):
        await run_in_threadpool(look)
    return responses.Completions(
        completions=[
            responses.Completion(
                state="failed" if one.failed else "finished",
                request_id=str(one.request_id),
                response_payload_uncompressed_size=one.num_bytes,
            )
            for one in found
            if str(one.request_id) not in retrieved
        ],
        cursor=cursor,
    )


@router.post("/cancel_future", responses=refuses(404))
def cancel_future(api: Api, request: Annotated[requests.CancelFuture, body(requests.CancelFuture)]) -> responses.Empty:
    """A sample that is not done fails as cancelled and its slots are freed; training goes on once it has started."""
    request_id = _parse_id(request.request_id)
    if api.jobs.get(request_id) is None:
        raise NotFound("request_id", request.request_id, "a request of this server")
    api.jobs.cancel(request_id)
    return responses.Empty()


def _parse_id(text: str) -> int:
    # The length first: Python refuses to read thousands of digits.
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) >= 2**31:
        raise NotFound("request_id", text, "a request of this server")
    return int(text)


def _answer(job: Any, protobuf: bool) -> Response:
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


def _try_again(api: Service, job: Any) -> Response:
    state, reason = api.queue_state(job)
    reply = responses.TryAgain(request_id=str(job.request_id), queue_state=state, queue_state_reason=reason)
    return JSONResponse(reply.model_dump(exclude_none=True), status_code=408)
