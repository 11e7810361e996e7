"""Health, client configuration, capabilities, telemetry, keys, metrics."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tx.tinker import telemetry
from tx.tinker.db import LOCAL
from tx.tinker.openapi import describes_body, refuses
from tx.tinker.service import Api, Service, body
from tx.tinker.wire import admin, compat, requests, responses, results

router = APIRouter()
log = logging.getLogger(__name__)

MAX_CONCURRENT_SAMPLES = 400
"""Per sampling client. Without TLS every one of them is a TCP connection (protocol §1.3)."""

_MAX_LOGGED_CHARS = 500

_NOT_READY = responses.Health | responses.Problem


@router.get(
    "/healthz",
    responses={503: {"description": "The engine is not ready, or the database away.", "model": _NOT_READY}},
)
def health(api: Api, response: Response) -> responses.Health:
    """200 only when the engine is ready."""
    state = api.health()
    response.status_code = 200 if state.status == "ok" else 503
    return state


@router.get("/livez")
async def live() -> responses.Alive:
    """200 whenever the API process can answer at all, whatever state the engine and the database are in."""
    return responses.Alive()


@router.post("/client/config", response_model_exclude_none=True)
def client_config(
    api: Api, http: Request, request: Annotated[requests.ClientVersion, body(requests.ClientVersion)]
) -> admin.ClientConfig:
    """Flags for the SDK. All are said, most of them at the SDK's own defaults.

    ``sample_use_retrieve_futures`` stays off although retrieve_futures is served: with it a short sample takes half as
    long again (one more round trip), and the client never asks why it waits. Keys are exchanged for tokens where there
    are keys, by the SDKs of which that is tested. Custom losses are the client's to compute.
    """
    log.debug("Client with SDK %s", request.sdk_version)
    version = compat.client_version(http.headers) or compat.parse_version(request.sdk_version)
    return admin.ClientConfig(
        pjwt_auth_enabled=api.auth.keys is not None and compat.exchanges_keys(version),
        credential_default_source="api_key",
        parallel_fwdbwd_chunks=compat.sends_first_chunk_last(version),
        proto_compress_fwdbwd=False,
        fwdbwd_max_chunk_len=1024,
        fwdbwd_max_chunk_bytes_count=5_000_000,
        fwdbwd_dispatch_bytes_semaphore_size=50_000_000,
        sample_dispatch_bytes_semaphore_size=10 * 2**20,
        inflight_response_bytes_semaphore_size=50 * 2**20,
        sample_max_concurrent_requests=MAX_CONCURRENT_SAMPLES,
        sample_no_retries=False,
        sample_enable_stuck_detection=True,
        sample_use_retrieve_futures=False,
        sample_join_sampling_session=True,
        custom_loss_server_side=False,
        use_pyqwest_transport=True,
        billing_exception_max_pause_duration_sec=3600,
        **compat.client_flags(version),
    )


@router.post("/client/dynamic_config")
def client_dynamic_config(
    request: Annotated[requests.ClientVersion, body(requests.ClientVersion)],
) -> admin.ClientDynamicConfig:
    """Flags that the SDK asks for again from time to time."""
    return admin.ClientDynamicConfig(
        refresh_interval_sec=300, sample_cancel_enabled=True, sample_cancel_max_batch_size=64
    )


@router.get("/get_server_capabilities", response_model_exclude_none=True)
def capabilities(api: Api) -> responses.Capabilities:
    """What is served, under every name."""
    return responses.Capabilities(
        supported_models=[
            responses.SupportedModel(
                model_name=name, max_context_length=(engine.max_context or None) if engine is not None else None
            )
            for name, engine in api.served_models().items()
        ]
    )


@router.post("/telemetry")
@describes_body(results.TelemetryReport)
async def report_telemetry(api: Api, http: Request) -> admin.TelemetryAccepted:
    """Clients report here what they did and how they crashed. Whatever comes is accepted; GET telemetry reads it."""
    batch = telemetry.read(await http.body())
    await run_in_threadpool(_keep, api, batch)
    return admin.TelemetryAccepted()


@router.post("/auth/token")
def auth_token(api: Api) -> admin.AuthToken:
    """Stands for the caller's key for an hour; without a key file it is the local user's, and opens nothing."""
    return admin.AuthToken(jwt=api.auth.new_token(api.caller))


@router.get("/auth/apikey/me", responses=refuses(401))
def get_own_key(api: Api, x_api_key: Annotated[str | None, Header()] = None) -> admin.ApiKey:
    """What the CLI's login stores beside the key: whose it is; without a key file, the local user's, as any key is."""
    if not x_api_key and api.auth.keys is None:
        raise HTTPException(401, "X-API-Key: got nothing, accepted: any key")
    name, any_key = api.caller.name, "This server has no accounts and accepts any key."
    whose = admin.KeyDetails(org_details=admin.Named(name=LOCAL), user_details=admin.Mailbox(email=name))
    return admin.ApiKey(key_id=1, name=name, note=any_key if api.auth.keys is None else "", details=whose)


@router.delete("/auth/apikey/me")
def delete_own_key() -> responses.Empty:
    """The CLI's logout forgets the key on its side; here only ``tx.tinker.keys`` revokes one."""
    return responses.Empty()


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(api: Api) -> PlainTextResponse:
    """Prometheus' text format."""
    gauges = {
        "tx_engine_ready": float(api.health().status == "ok"),
        "tx_engine_restarts": float(api.engine_process.restarts if api.engine_process is not None else 0),
        "tx_jobs_unfinished": float(api.jobs.num_pending()),
        "tx_sequences_unfinished": float(api.num_sequences(api.config.base_model_name)),
    }
    return PlainTextResponse(api.metrics.render(gauges), media_type="text/plain; version=0.0.4")


def _keep(api: Service, batch: telemetry.Batch) -> None:
    for event in batch.events:
        kind, severity = telemetry.kind_of(event), telemetry.severity_of(event)
        api.metrics.count("tx_telemetry_events_total", event=kind, severity=severity)
        if event.get("error_type"):
            message = f"{event['error_type']}: {event.get('error_message')}"[:_MAX_LOGGED_CHARS]
            log.warning("Client of session %s reports %r", batch.session_id, message)
    if batch.num_dropped:
        api.metrics.count("tx_telemetry_events_dropped_total", batch.num_dropped)
    try:
        telemetry.keep(api.db, batch, api.caller.owner)
    except (DBAPIError, PoolTimeout) as error:  # the client has other worries
        log.warning("%d telemetry events could not be stored: %s", len(batch.events), error)
