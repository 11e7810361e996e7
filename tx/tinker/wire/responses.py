"""Bodies of the JSON replies (protocol §2). Unset optional fields are left out: a null can be invalid for a client."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel


class _Reply(BaseModel):
    pass


class Problem(_Reply):
    """Every refusal and error: which field, what it was, what is accepted."""

    detail: str


class Future(_Reply):
    """What a request that became a job is answered with."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


type QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


class TryAgain(_Reply):
    """A future that is not there yet (HTTP 408)."""

    type: Literal["try_again"] = "try_again"
    request_id: str
    queue_state: QueueState = "active"
    queue_state_reason: str | None = None


class Failure(_Reply):
    """A future that failed (HTTP 200: the request for it went well)."""

    error: str
    category: Literal["unknown", "server", "user"]
    request_id: str


class Completion(_Reply):
    """A sample that is over, in retrieve_futures; its result is fetched with retrieve_future."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class Completions(_Reply):
    """retrieve_futures: ``cursor`` is where the next poll goes on."""

    completions: list[Completion]
    cursor: int


class CreatedSession(_Reply):
    """create_session."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: Literal["create_session"] = "create_session"


class Heartbeat(_Reply):
    """session_heartbeat."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class SamplingSession(_Reply):
    """create_sampling_session."""

    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class ModelData(_Reply):
    """What a client needs to tokenize for a model."""

    arch: str | None = None
    model_name: str
    tokenizer_id: str | None = None


class ModelInfo(_Reply):
    """get_info; ``optimizer_config`` must be absent rather than null."""

    type: Literal["get_info"] = "get_info"
    model_id: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int
    model_name: str
    optimizer_config: dict[str, Any] | None = None


class Sampler(_Reply):
    """samplers/{id}."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class SupportedModel(_Reply):
    """One name under which a base model is served."""

    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


class Capabilities(_Reply):
    """get_server_capabilities."""

    supported_models: list[SupportedModel]


class Checkpoint(_Reply):
    """One checkpoint in a listing."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


_CHECKPOINT_TYPES: dict[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


def checkpoint(row: dict[str, Any]) -> Checkpoint:
    """The columns of a stored checkpoint as clients list it."""
    return Checkpoint(
        checkpoint_id=f"{row['kind']}/{row['name']}",
        checkpoint_type=_CHECKPOINT_TYPES[row["kind"]],
        time=timestamp(row["created_at"]),
        tinker_path=f"tinker://{row['model_id']}/{row['kind']}/{row['name']}",
        size_bytes=row["size_bytes"],
        public=row["public"],
        user_metadata=row["user_metadata"] or None,
        expires_at=timestamp(row["expires_at"]) if row["expires_at"] is not None else None,
    )


class Cursor(_Reply):
    """Where a page of a listing lies."""

    offset: int
    limit: int
    total_count: int


class Checkpoints(_Reply):
    """Listings of checkpoints; only the one over all models has a cursor."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(_Reply):
    """A model, as the REST listing calls it."""

    training_run_id: str
    base_model: str
    model_owner: str = "local"
    is_lora: bool = True
    corrupted: bool = False
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRuns(_Reply):
    """training_runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class WeightsInfo(_Reply):
    """weights_info: what a client must know to create a model for a checkpoint."""

    base_model: str
    is_lora: bool = True
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    optimizer_config: dict[str, Any] | None = None


class CopiedWeights(_Reply):
    """copy_weights."""

    tinker_path: str


class FileUrls(_Reply):
    """external_weights_urls: a signed URL for each file."""

    urls: dict[str, str]
    expires: datetime


class ArchiveUrl(_Reply):
    """archive: a signed URL of all files as one tar."""

    url: str
    expires: datetime


class Sessions(_Reply):
    """sessions."""

    sessions: list[str]


class Session(_Reply):
    """sessions/{id}."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class SessionActive(_Reply):
    """Its client gives signs of life."""

    type: Literal["active"] = "active"


class SessionCancelled(_Reply):
    """Its client has fallen silent."""

    type: Literal["cancelled"] = "cancelled"
    detail: str


class FailedRequest(_Reply):
    """The request that a session failed with."""

    type: Literal["request"] = "request"
    request_id: str
    request_type: str


class FailedTrainingRun(_Reply):
    """The training run that a session failed with: it could not be created."""

    type: Literal["training_run"] = "training_run"
    training_run_id: str


class SessionFailed(_Reply):
    """Its client has fallen silent, and the last answer that it got was a failure."""

    type: Literal["failed"] = "failed"
    category: Literal["user", "internal"]
    reason: FailedRequest | FailedTrainingRun
    message: str


class SessionFinishReason(_Reply):
    """How a client said that it ended."""

    type: Literal["success", "errored", "interrupted"]


class SessionFinished(_Reply):
    """Its client has finished it."""

    type: Literal["client_finished"] = "client_finished"
    reason: SessionFinishReason
    detail: str | None = None


type SessionStatus = SessionActive | SessionCancelled | SessionFailed | SessionFinished


class SessionSummary(_Reply):
    """A session that a search found; ``project_id`` is empty for one that is in none."""

    session_id: str
    created_at: datetime
    owner: str = "local"
    project_id: str
    status: SessionStatus | None = None
    checkpoints_count: int
    checkpoint_storage_bytes: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None


class SearchCursor(_Reply):
    """Where the next page of a search starts."""

    last_created_at: datetime
    last_session_id: str


class FoundSessions(_Reply):
    """sessions/search; no cursor on the last page."""

    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None = None


class Empty(_Reply):
    """The reply to a request that only changes something."""


class Health(_Reply):
    """healthz: ``status`` is ok only while the engine is ready."""

    status: Literal["ok", "starting", "recovering", "failed"]
    engine: str
    base_model: str
    detail: str | None = None


class Alive(_Reply):
    """livez."""

    status: Literal["alive"] = "alive"


def timestamp(seconds: float) -> datetime:
    """Seconds since the epoch as the timezone-aware time that clients insist on."""
    return datetime.fromtimestamp(seconds, UTC)
