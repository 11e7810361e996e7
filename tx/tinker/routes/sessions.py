"""Create, heartbeat, finish, list, search sessions; put them into projects."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException

from tx.errors import InvalidInput
from tx.tinker import db, session_search
from tx.tinker.openapi import refuses
from tx.tinker.service import AccessScope, Api, IdempotencyKey, Limit, Offset, SessionId, body
from tx.tinker.wire import requests, responses

router = APIRouter()


@router.post("/create_session", response_model_exclude_none=True)
def create_session(
    api: Api,
    request: Annotated[requests.CreateSession, body(requests.CreateSession)],
    x_idempotency_key: IdempotencyKey = None,
) -> responses.CreatedSession:
    """A retry carries the same idempotency key and gets the same session."""
    created = api.clock()
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


@router.post("/session_heartbeat", responses=refuses(404, 410))
async def session_heartbeat(
    api: Api, request: Annotated[requests.SessionHeartbeat, body(requests.SessionHeartbeat)]
) -> responses.Heartbeat:
    """410 ends the client's loop, for a session that it has finished itself."""
    if not await api.heartbeats.beat(request.session_id, api.caller.owner):
        raise HTTPException(410, f"session_id: {request.session_id} is finished.")
    return responses.Heartbeat()


@router.post("/sessions/{session_id}/finish", responses=refuses(404))
def finish_session(
    api: Api, session_id: SessionId, request: Annotated[requests.FinishSession, body(requests.FinishSession)]
) -> responses.Empty:
    """The first end of a session stays; later requests in it are refused, and nobody waits for its samples."""
    api.sessions.finish(session_id, request.reason.type, request.detail)
    api.jobs.cancel(*api.jobs.unfinished_samples(session_id), error="Cancelled: its session was finished.")
    return responses.Empty()


@router.get("/sessions")
def list_sessions(
    api: Api, limit: Limit = 20, offset: Offset = 0, access_scope: AccessScope = "owned"
) -> responses.Sessions:
    """Newest first."""
    return responses.Sessions(sessions=api.sessions.recent(limit, offset))


@router.get("/sessions/{session_id}", response_model_exclude_none=True, responses=refuses(404))
def get_session(api: Api, session_id: SessionId, access_scope: AccessScope = "owned") -> responses.Session:
    """Models and samplers of a session."""
    session = api.sessions.get(session_id)
    models, samplers = api.sessions.contents(session_id)
    return responses.Session(
        training_run_ids=models,
        sampler_ids=samplers,
        user_metadata=session.user_metadata,
        display_name=session.display_name,
    )


@router.post("/sessions/search", response_model_exclude_none=True)
def search_sessions(
    api: Api, request: Annotated[requests.SearchSessions, body(requests.SearchSessions)]
) -> responses.FoundSessions:
    """Newest first, with what became of each; ``tx.tinker.session_search`` says how that is told."""
    return session_search.search(
        api.db,
        request,
        at=api.clock(),
        active_since=api.active_since(),
        silent_before=api.silent_before(),
        owner=api.caller.owner,
    )


@router.put("/sessions/{session_id}/project", responses=refuses(404))
def assign_project(
    api: Api, session_id: SessionId, request: Annotated[requests.AssignProject, body(requests.AssignProject)]
) -> responses.Empty:
    """Into a project, or from one to another; never out of all of them."""
    if not request.project_id:
        accepted = "the id of a project: a session can go into another project, but not out of the one that it is in"
        raise InvalidInput("project_id", request.project_id, accepted)
    api.sessions.assign_project(session_id, request.project_id)
    return responses.Empty()
