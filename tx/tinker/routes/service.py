"""Health, client configuration, capabilities, telemetry, metrics."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Response

from tx.tinker.service import Api, body
from tx.tinker.wire import compat, requests, responses

router = APIRouter()
log = logging.getLogger(__name__)

MAX_CONCURRENT_SAMPLES = 400
"""Per sampling client. Without TLS every one of them is a TCP connection (protocol §1.3)."""

_MAX_LOGGED_CHARS = 500


@router.get("/healthz")
def health(api: Api, response: Response) -> responses.Health:
    """200 only when the engine is ready."""
    state = api.health()
    response.status_code = 200 if state.status == "ok" else 503
    return state


@router.post("/client/config")
def client_config(
    api: Api, request: Annotated[requests.ClientConfig, body(requests.ClientConfig)]
) -> dict[str, int | bool]:
    """Flags for the SDK; all others keep their defaults.

    ``sample_use_retrieve_futures`` stays off although retrieve_futures is served: with it a short sample takes half as
    long again (one more round trip), and the client never asks why it waits.
    """
    log.debug("Client with SDK %s", request.sdk_version)
    flags = {"sample_max_concurrent_requests": MAX_CONCURRENT_SAMPLES, "sample_use_retrieve_futures": False}
    return flags | compat.client_flags(compat.parse_version(request.sdk_version))


@router.post("/client/dynamic_config")
def client_dynamic_config(
    request: Annotated[requests.ClientConfig, body(requests.ClientConfig)],
) -> dict[str, int | bool]:
    """Flags that the SDK asks for again from time to time."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


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
def telemetry(request: Annotated[requests.Telemetry, body(requests.Telemetry)]) -> dict[str, str]:
    """Clients report their crashes here; they go to the log, cut short."""
    for event in request.events[:100]:
        if event.error_type:
            message = f"{event.error_type}: {event.error_message}"[:_MAX_LOGGED_CHARS]
            log.warning("Client of session %s reports %r", request.session_id, message)
    return {"status": "accepted"}


@router.get("/metrics")
def metrics(api: Api) -> Response:
    """Prometheus' text format."""
    gauges = {
        "tx_engine_ready": float(api.health().status == "ok"),
        "tx_engine_restarts": float(api.engine_process.restarts if api.engine_process is not None else 0),
        "tx_jobs_unfinished": float(api.jobs.num_pending()),
        "tx_sequences_unfinished": float(api.num_sequences(api.config.base_model_name)),
    }
    return Response(api.metrics.render(gauges), media_type="text/plain; version=0.0.4")
