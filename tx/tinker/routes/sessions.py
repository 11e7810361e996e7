"""Create, heartbeat, finish, list sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Request

from tx.tinker import db
from tx.tinker.service import Api, Limit, Offset, body
from tx.tinker.wire import requests, responses

router = APIRouter()


@router.post("/create_session", response_model_exclude_none=True)
def create_session(
    api: Api,
    http: Request,
    request: Annotated[requests.CreateSession, body(requests.CreateSession)],
    x_idempotency_key: Annotated[str | None, Header(max_length=300)] = None,
) -> responses.CreatedSession:
    """A retry carries the same idempotency key and gets the same session."""
    created = db.now()
    session = db.Session(
        session_id="",
        created_at=created,
        heartbeat_at=created,
        tags=request.tags,
        user_metadata=request.user_metadata,
        sdk_version=request.sdk_version,
        display_name=request.display_name,
        project_id=request.project_id,
        idempotency_key=x_idempotency_key,
    )
    return responses.CreatedSession(session_id=api.sessions.create(session))


@router.post("/session_heartbeat")
def session_heartbeat(
    api: Api, request: Annotated[requests.SessionHeartbeat, body(requests.SessionHeartbeat)]
) -> responses.Heartbeat:
    """410 ends the client's loop, for a session that it has finished itself."""
    if api.sessions.heartbeat(request.session_id).finished_at is not None:
        raise HTTPException(410, f"session_id: {request.session_id} is finished.")
    return responses.Heartbeat()


@router.post("/sessions/{session_id}/finish")
def finish_session(
    api: Api, session_id: str, request: Annotated[requests.FinishSession, body(requests.FinishSession)]
) -> dict[str, str]:
    """The first end of a session stays; later requests in it are refused, and nobody waits for its samples."""
    api.sessions.finish(session_id, request.reason.type, request.detail)
    api.jobs.cancel(*api.jobs.unfinished_samples(session_id), error="Cancelled: its session was finished.")
    return {}


@router.get("/sessions")
def list_sessions(api: Api, limit: Limit = 20, offset: Offset = 0) -> responses.Sessions:
    """Newest first."""
    return responses.Sessions(sessions=api.sessions.recent(limit, offset))


@router.get("/sessions/{session_id}", response_model_exclude_none=True)
def get_session(api: Api, session_id: str) -> responses.Session:
    """Models and samplers of a session."""
    session = api.sessions.get(session_id)
    models, samplers = api.sessions.contents(session_id)
    return responses.Session(
        training_run_ids=models,
        sampler_ids=samplers,
        user_metadata=session.user_metadata,
        display_name=session.display_name,
    )
