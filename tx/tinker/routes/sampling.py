"""Sampling sessions and asample."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated

from fastapi import APIRouter

from tx.errors import InvalidInput
from tx.tinker.db import Sampler, now
from tx.tinker.jobs import NewJob
from tx.tinker.openapi import refuses
from tx.tinker.service import Api, SamplerId, body, fingerprint, payload_of
from tx.tinker.wire import admin, paths, requests, responses

router = APIRouter()


@router.post("/create_sampling_session", responses=refuses(404))
def create_sampling_session(
    api: Api, request: Annotated[requests.CreateSamplingSession, body(requests.CreateSamplingSession)]
) -> responses.SamplingSession:
    """Bound for ever to the base model or to the checkpoint that ``model_path`` names."""
    served_name = request.base_model
    base_model = api.canonical(request.base_model) if request.base_model is not None else None
    if request.base_model is not None and base_model is None:
        raise InvalidInput("base_model", request.base_model, "one of " + ", ".join(api.served_models()))
    if request.model_path is not None:
        _, source = api.sessions.checkpoint(paths.parse_path(request.model_path, "model_path"), "model_path")
        if base_model is not None and base_model != source.base_model:
            raise InvalidInput("base_model", request.base_model, f"{source.base_model}, which the weights are of")
        base_model, served_name = source.base_model, served_name or source.served_name
    sampler = Sampler(
        sampler_id=paths.sampler_id(request.session_id, request.sampling_session_seq_id),
        session_id=request.session_id,
        seq=request.sampling_session_seq_id,
        base_model=base_model or "",
        served_name=served_name or "",
        model_path=request.model_path,
        kind="base" if request.model_path is None else "path",
        created_at=now(),
    )
    return responses.SamplingSession(sampling_session_id=api.sessions.create_sampler(sampler).sampler_id)


@router.post("/join_sampling_session", responses=refuses(404))
def join_sampling_session(
    api: Api, request: Annotated[requests.JoinSamplingSession, body(requests.JoinSamplingSession)]
) -> admin.JoinedSamplingSession:
    """A number for one more copy of a sampling client, so that no two copies give their requests the same seq_id."""
    return admin.JoinedSamplingSession(client_counter=api.sessions.join_sampler(request.sampling_session_id))


@router.get("/samplers/{sampler_id}", response_model_exclude_none=True, responses=refuses(404))
def get_sampler(api: Api, sampler_id: SamplerId) -> responses.Sampler:
    """What a sampling session samples from."""
    sampler = api.sessions.sampler(sampler_id)
    return responses.Sampler(
        sampler_id=sampler.sampler_id, base_model=sampler.served_name, model_path=sampler.model_path
    )


@router.post("/asample", response_model_exclude_none=True, responses=refuses(404, 429))
async def asample(api: Api, request: Annotated[requests.Sample, body(requests.Sample)]) -> responses.Future:
    """The reply names the sequences to come, from the request's id: a retry gets the same names.

    429 while the queue is full: nothing is stored, and the same request may come again.
    """
    sampler = await asyncio.to_thread(api.sessions.sampler_for_work, request.sampling_session_id)
    retry_key = fingerprint(payload_of(request))
    if request.sampling_params.seed is None:
        # Drawn once and stored: after a crash the job gives the same tokens.
        seed = secrets.randbits(63)
        request.sampling_params = request.sampling_params.model_copy(update={"seed": seed})
    job = NewJob(
        kind="sample",
        base_model=sampler.base_model,
        session_id=sampler.session_id,
        sampler_id=sampler.sampler_id,
        seq_id=request.seq_id,
        payload=payload_of(request),
        fingerprint=retry_key,
        tokens_in=request.prompt.num_tokens,
        num_sequences=request.num_samples,
        share=api.caller.share,
    )
    request_id = await api.appender.append(job)
    return responses.Future(
        request_id=str(request_id),
        sample_sequence_ids=[paths.sample_sequence_id(request_id, sample) for sample in range(request.num_samples)],
    )
