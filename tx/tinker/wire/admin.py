"""Reply bodies of the service-wide endpoints: usage, audit log, telemetry, traces, keys (protocol §2.1, §2.6)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class TrainingUsage(BaseModel):
    """Tokens that forward and backward passes went through."""

    type: Literal["training"] = "training"
    token_count: int


class PrefillUsage(BaseModel):
    """Prompt tokens of samples; ``cached``: those whose keys and values were there already."""

    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SampleUsage(BaseModel):
    """Tokens that were sampled."""

    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointUsage(BaseModel):
    """Checkpoints that were saved."""

    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageUsage(BaseModel):
    """Checkpoints that lay in storage; a gigabyte is 10⁹ bytes."""

    type: Literal["storage"] = "storage"
    free: bool = False
    gigabyte_hours: float


EventInfo = Annotated[
    TrainingUsage | PrefillUsage | SampleUsage | CheckpointUsage | StorageUsage, Field(discriminator="type")
]


class UsageEvent(BaseModel):
    """One kind of usage of one session in one UTC hour; storage belongs to no session."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: EventInfo


class UsageSession(BaseModel):
    """What a session said of itself."""

    user_metadata: dict[str, str] | None = None


class Usage(BaseModel):
    """billing/usage/events: by bucket, then the most tokens first; ``sessions`` has every session in ``data``."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession]


class StorageItem(BaseModel):
    """Checkpoints of one project."""

    project_id: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float


class CheckpointStorage(BaseModel):
    """billing/usage/checkpoints/current."""

    data: list[StorageItem]
    effective_rate_usd_per_gigabyte_month: float


class AuditEntry(BaseModel):
    """One change; ``event_details`` says who made it and whatever else is known of it."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLog(BaseModel):
    """audit: sorted by time."""

    entries: list[AuditEntry]


class TraceExport(BaseModel):
    """sessions/{id}/trace_export: always ready, since a trace is built while it is downloaded."""

    status: Literal["ready"] = "ready"
    url: str


class Trace(BaseModel):
    """files/{session_id}/trace: Chrome's trace format (``tx.tinker.traces`` writes it)."""

    traceEvents: list[dict[str, Any]]
    displayTimeUnit: Literal["ms"]
    otherData: dict[str, Any]


class TelemetryAccepted(BaseModel):
    """POST telemetry: whatever came."""

    status: Literal["accepted"] = "accepted"


class ReportedEvent(BaseModel):
    """One event as a client reported it."""

    session_id: str
    received_at: datetime
    severity: str
    event: dict[str, Any]


class ReportedEvents(BaseModel):
    """GET telemetry: newest first."""

    events: list[ReportedEvent]


class AuthToken(BaseModel):
    """auth/token."""

    jwt: str


class Named(BaseModel):
    """An organization."""

    name: str


class Mailbox(BaseModel):
    """A user."""

    email: str


class KeyDetails(BaseModel):
    """Whose a key is."""

    org_details: Named
    user_details: Mailbox


class ApiKey(BaseModel):
    """auth/apikey/me."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class JoinedSamplingSession(BaseModel):
    """join_sampling_session: the caller's own number, from 1; the client that opened the session is 0."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class ClientConfig(BaseModel):
    """client/config: every flag of the SDK, said rather than left to its defaults; the last three are older ones'."""

    pjwt_auth_enabled: bool
    credential_default_source: Literal["api_key"]
    parallel_fwdbwd_chunks: bool
    proto_compress_fwdbwd: bool
    fwdbwd_max_chunk_len: int
    fwdbwd_max_chunk_bytes_count: int
    fwdbwd_dispatch_bytes_semaphore_size: int
    sample_dispatch_bytes_semaphore_size: int
    inflight_response_bytes_semaphore_size: int
    sample_max_concurrent_requests: int
    sample_no_retries: bool
    sample_enable_stuck_detection: bool
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool
    custom_loss_server_side: bool
    use_pyqwest_transport: bool
    billing_exception_max_pause_duration_sec: int
    proto_write_fwdbwd: bool | None = None
    fwd_via_fwdbwd: bool | None = None
    create_model_via_load_weights: bool | None = None


class ClientDynamicConfig(BaseModel):
    """client/dynamic_config: the flags that a running client asks for again."""

    refresh_interval_sec: int
    sample_cancel_enabled: bool
    sample_cancel_max_batch_size: int
