"""The training requests and all results as JSON, as models: what the OpenAPI document says of them.

Nothing is read or written through these: ``json_bodies`` reads and writes such bodies by hand, because validating a
list of numbers one by one takes longer than to compute with it. Tests hold the two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from tx.tinker.wire.requests import Id, Int64, Text

Int32 = Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)]


class TokenChunk(BaseModel):
    """Token ids; chunks of images and other things are refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[Int32]


class ModelInput(BaseModel):
    """Tokens, in chunks that are one behind the other."""

    chunks: list[TokenChunk]


class TensorData(BaseModel):
    """A tensor: all values, or with both lists of indices the cells of a compressed sparse row matrix."""

    data: list[int | float]
    dtype: Literal["float32", "int64"]
    shape: list[Int64] | None = None
    sparse_crow_indices: list[Int64] | None = None
    sparse_col_indices: list[Int64] | None = None


class Datum(BaseModel):
    """One example; which tensors it needs is the loss's to say."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


class LossInput(BaseModel):
    """Examples and what to do with them."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackwardBody(BaseModel):
    """POST forward_backward."""

    model_id: Id
    seq_id: Int64 | None = None
    forward_backward_input: LossInput


class ForwardBody(BaseModel):
    """POST forward: losses without gradients."""

    model_id: Id
    seq_id: Int64 | None = None
    forward_input: LossInput


class TrainingBody(RootModel[ForwardBackwardBody | ForwardBody]):
    """POST forward_backward and forward; which of them it is, the body says."""


class DatumOutput(RootModel[dict[str, TensorData]]):
    """What a loss says of one datum, ``logprobs`` above all."""


class ForwardBackwardResult(BaseModel):
    """Of forward and forward_backward; outputs are in the order of the data."""

    loss_fn_output_type: str
    loss_fn_outputs: list[DatumOutput]
    metrics: dict[str, float]


type TopkLogprobs = list[list[tuple[int, float]] | None]


class SequenceResult(BaseModel):
    """One sampled sequence."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]
    topk_sampled_logprobs: TopkLogprobs | None = None


class AlternativeTokens(BaseModel):
    """Tokens that were drawn at the positions of a prompt."""

    tokens: TensorData
    logprobs: TensorData


class SampleResult(BaseModel):
    """Of asample."""

    type: Literal["sample"]
    sequences: list[SequenceResult]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: AlternativeTokens | None = None


class ModelResult(BaseModel):
    """Of create_model and unload_model."""

    type: Literal["create_model", "unload_model"]
    model_id: str


class LoadResult(BaseModel):
    """Of load_weights."""

    type: Literal["load_weights"]
    model_id: str
    path: str


class SaveResult(BaseModel):
    """Of saves; of one for sampling that has no name, the sampling session in place of a path."""

    type: Literal["save_weights", "save_weights_for_sampler", "save_weights_external"]
    path: str | None = None
    sampling_session_id: str | None = None
    size_bytes: int | None = None


class StepResult(BaseModel):
    """Of optim_step."""

    type: Literal["optim_step"]
    metrics: dict[str, float] | None = None


type Result = SampleResult | ForwardBackwardResult | ModelResult | LoadResult | SaveResult | StepResult


class TelemetryReport(BaseModel):
    """POST telemetry; whatever else comes is accepted and dropped."""

    model_config = ConfigDict(extra="allow")

    session_id: Text = ""
    events: list[dict[str, Any]] = []
    sdk_version: str = ""
    platform: str = ""
    process_uuid: str = ""
