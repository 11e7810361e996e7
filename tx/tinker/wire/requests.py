"""Bodies of the JSON requests (protocol §2), checked for shape: types, ranges, names. Meaning is checked elsewhere.

Types are strict (no ``"5"`` for 5, no NaN). A field that tx does not know is refused by its name in requests whose
meaning it could change, and ignored in those that only announce something.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tx.errors import InvalidInput
from tx.tinker.wire.paths import NAME_PATTERN, check_name

_INT64_MAX = 2**63 - 1
MIN_TTL_S = 3600
MAX_TTL_S = 10 * 365 * 24 * 3600


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("It must not contain NUL characters")  # PostgreSQL can't store them
    return value


def _name(value: str) -> str:
    try:
        return check_name(value)
    except InvalidInput as error:
        raise ValueError(str(error).split("accepted: ")[-1]) from error


def _check_json(value: Any) -> None:
    """Raise ValueError for what databases and clients don't take for JSON: NaN, infinities, NUL characters."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("Numbers must be finite")
    if isinstance(value, str):
        _no_nul(value)
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_json(item)


def _null_is_empty(value: Any) -> Any:
    return {} if value is None else value


_NO_NUL = Field(json_schema_extra={"pattern": r"^[^\u0000]*$"})
Text = Annotated[str, AfterValidator(_no_nul), _NO_NUL]
Id = Annotated[str, AfterValidator(_no_nul), _NO_NUL, Field(min_length=1, max_length=300)]
Name = Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]
Metadata = Annotated[dict[Text, Text], BeforeValidator(_null_is_empty)]
Int64 = Annotated[int, Field(ge=-_INT64_MAX - 1, le=_INT64_MAX)]
Seq = Annotated[int, Field(ge=0, le=_INT64_MAX)]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]
Real = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Old SDKs send every unset field as null; a null means the default."""
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class CreateSession(_Lenient):
    """POST create_session."""

    tags: list[Text] = []
    user_metadata: Metadata = {}
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class SessionHeartbeat(_Lenient):
    """POST session_heartbeat."""

    session_id: Id


class FinishReason(_Lenient):
    """How a client says that it ended."""

    type: Literal["success", "errored", "interrupted"]


class FinishSession(_Lenient):
    """POST sessions/{id}/finish."""

    reason: FinishReason
    detail: Text | None = None


class AssignProject(_Lenient):
    """PUT sessions/{id}/project."""

    project_id: Text | None = None


class OwnSessions(_Strict):
    """Search the caller's own sessions."""

    type: Literal["own"] = "own"


class AccessibleSessions(_Strict):
    """Search everybody's sessions."""

    type: Literal["accessible"]


class SessionsOfUsers(_Strict):
    """Search the sessions of these users."""

    type: Literal["user"]
    owner_urns: Annotated[list[Text], Field(min_length=1, max_length=10)]


class StatusQuery(_Strict):
    """A status to match."""

    type: Literal["active", "cancelled", "failed"]


class FinishedQuery(_Strict):
    """Match sessions that their client has finished, for one of these reasons or for any."""

    type: Literal["client_finished"]
    reasons: Annotated[list[Literal["success", "errored", "interrupted"]] | None, Field(min_length=1)] = None


class SearchStart(_Strict):
    """The last session of the page before."""

    last_created_at: Annotated[AwareDatetime, Field(strict=False)]  # after _drop_nulls, strict would refuse text
    last_session_id: Id


class SearchSessions(_Strict):
    """POST sessions/search; what is not given does not restrict the search."""

    session_id: Text | None = None
    project_ids: list[Text] | None = None
    user_metadata: Metadata = {}
    display_name: Annotated[Text, Field(min_length=1)] | None = None
    owner: Annotated[OwnSessions | AccessibleSessions | SessionsOfUsers, Field(discriminator="type")] = OwnSessions()
    statuses: (
        Annotated[
            list[Annotated[StatusQuery | FinishedQuery, Field(discriminator="type")]],
            Field(min_length=1),
        ]
        | None
    ) = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchStart | None = None


class LoraConfig(_Strict):
    """The adapter that a client asks for."""

    rank: Annotated[int, Field(ge=1, le=2**16)] = 32
    seed: Int64 | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _trains_something(self) -> LoraConfig:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise ValueError("At least one of train_unembed, train_mlp, train_attn must be true")
        return self


class OptimizerConfig(BaseModel):
    """Which optimizer; other types than adamw are refused later, by name."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Text

    @model_validator(mode="after")
    def _can_be_stored(self) -> OptimizerConfig:
        _check_json(self.model_extra)
        return self


class CreateModel(_Strict):
    """POST create_model."""

    session_id: Id
    model_seq_id: Seq
    base_model: Id
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: OptimizerConfig | None = None
    user_metadata: Metadata = {}
    type: Literal["create_model"] = "create_model"


class LoadWeights(_Strict):
    """POST load_weights: into an existing model (model_id, seq_id), or creating one (session_id, model_seq_id)."""

    path: Text
    optimizer: bool = False
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: Id | None = None
    user_metadata: Metadata = {}
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Text | None = None
    type: Literal["load_weights"] = "load_weights"

    @property
    def creates_model(self) -> bool:
        """Whether this is a create-via-load."""
        return self.model_id is None

    @model_validator(mode="after")
    def _one_addressing(self) -> LoadWeights:
        into, create = self.model_id is not None, self.session_id is not None and self.model_seq_id is not None
        if into == create:
            raise ValueError("Give either model_id (with seq_id) or session_id with model_seq_id")
        return self


class ModelRequest(_Lenient):
    """POST get_info and unload_model."""

    model_id: Id


class AdamParams(_Strict):
    """One AdamW step."""

    learning_rate: NonNegative = 1e-4
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: NonNegative = 1e-12
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0


class OptimStep(_Strict):
    """POST optim_step."""

    model_id: Id
    seq_id: Seq | None = None
    adam_params: AdamParams | None = None
    optimizer_params: OptimizerConfig | None = None
    type: Literal["optim_step"] = "optim_step"

    @model_validator(mode="after")
    def _has_params(self) -> OptimStep:
        if (self.adam_params is None) == (self.optimizer_params is None):
            raise ValueError("Give adam_params")
        return self


class SaveWeights(_Strict):
    """POST save_weights."""

    model_id: Id
    path: Name
    seq_id: Seq | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata = {}
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSampler(_Strict):
    """POST save_weights_for_sampler: named (path), or unnamed (sampling_session_seq_id)."""

    model_id: Id
    path: Name | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: Seq | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata = {}
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"

    @model_validator(mode="after")
    def _named_or_not(self) -> SaveWeightsForSampler:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("Give either path or sampling_session_seq_id")
        return self


class SaveWeightsExternal(_Strict):
    """POST save_weights_external; which recipients are good is checked when it runs."""

    model_id: Id
    path: Name
    seq_id: Seq | None = None
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[Text] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class CopyWeights(_Strict):
    """POST copy_weights: into a session's model, or into a project (or none) by a session of its own."""

    source_path: Text
    destination_project_id: Text | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: Text | None = None

    @model_validator(mode="after")
    def _one_destination(self) -> CopyWeights:
        if (self.session_id is None) != (self.model_seq_id is None):
            raise ValueError("Give session_id and model_seq_id together")
        if self.session_id is not None and self.destination_project_id is not None:
            raise ValueError("Give either destination_project_id or session_id with model_seq_id")
        return self


class CreateSamplingSession(_Strict):
    """POST create_sampling_session."""

    session_id: Id
    sampling_session_seq_id: Seq
    base_model: Id | None = None
    model_path: Text | None = None
    weights_access_token: Text | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"

    @model_validator(mode="after")
    def _names_something(self) -> CreateSamplingSession:
        if self.base_model is None and self.model_path is None:
            raise ValueError("Give model_path or base_model")
        return self


class Prompt(BaseModel):
    """Chunks of a prompt; their contents are the codec's to read."""

    model_config = ConfigDict(strict=True, extra="forbid")

    chunks: list[dict[str, Any]]

    @property
    def num_tokens(self) -> int:
        """Tokens in the text chunks, for the accounting."""
        tokens = (chunk.get("tokens") for chunk in self.chunks)
        return sum(len(item) for item in tokens if isinstance(item, list))


class SamplingParams(_Strict):
    """How to sample; ranges that depend on the model are the worker's to check."""

    max_tokens: int | None = None
    seed: Int64 | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Real = 1.0
    top_k: int = -1
    top_p: Real = 1.0


class Sample(_Strict):
    """POST asample."""

    prompt: Prompt
    sampling_session_id: Id
    seq_id: Seq | None = None
    num_samples: Annotated[int, Field(ge=1, le=2**14)] = 1
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: dict[str, Any] | None = None
    record_stability_info: bool = False
    type: Literal["sample"] = "sample"


class JoinSamplingSession(_Lenient):
    """POST join_sampling_session."""

    sampling_session_id: Id


class CreateCustomLoss(_Lenient):
    """POST create_custom_loss: only its name is read, to refuse it."""

    name: Text = ""


class RetrieveFuture(_Lenient):
    """POST retrieve_future; ``allow_metadata_only`` is an offer that this server never takes up."""

    request_id: Text
    allow_metadata_only: bool = False


class SamplingSessionTarget(_Lenient):
    """Which samples retrieve_futures is about; ``cloned_sampler_id`` tells apart the copies of one client."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Field(ge=0)] = 0


class RetrieveFutures(_Lenient):
    """POST retrieve_futures: what has finished since ``prev_cursor``, waiting at most ``timeout`` seconds for it."""

    target: SamplingSessionTarget
    prev_cursor: Annotated[Int64, Field(ge=0)] = 0
    timeout: Annotated[Real, Field(ge=0)] | None = None
    retrieved_request_ids: list[Text] = []


class CancelFuture(_Lenient):
    """POST cancel_future."""

    request_id: Text


class WeightsPath(_Lenient):
    """POST weights_info."""

    tinker_path: Text


class SetTtl(BaseModel):
    """PUT …/ttl; an explicit null is "never"."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttl_seconds: Ttl | None


class ClientVersion(_Lenient):
    """POST client/config and client/dynamic_config."""

    sdk_version: Text = ""


def parse[Body: BaseModel](model: type[Body], body: bytes) -> Body:
    """A request body, or InvalidInput naming the first field that is wrong."""
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        got = "nothing" if first["type"] == "missing" else _shown(first["input"])
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if first["type"] == "extra_forbidden":
            message = "no such field: this server does not know it"
        raise InvalidInput(field, got, message) from error


def _shown(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
