"""Bytes to ``tx.types`` and back: protobuf and JSON bodies, zstd.

It checks structure only (does it parse, do shapes, dtypes and byte counts agree) and names the field that doesn't;
whether a request makes sense for a model or a loss is the worker's to say. Both halves of the service import it, so it
loads numpy and protobuf, never JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import zstandard
from google.protobuf.message import DecodeError

from tx import types
from tx.errors import InvalidInput, TooLarge, Unsupported
from tx.tinker.wire import json_bodies
from tx.tinker.wire import tinker_pb2 as pb
from tx.tinker.wire.json_bodies import decode_sample, parse_json
from tx.tinker.wire.tensors import MAX_DENSE_CELLS, Budget, array, as_input, csr_rows, densify, shaped

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

FORWARD_BACKWARD_OUTPUT = "ForwardBackwardOutput"
"""Result type of a job whose result bytes are that protobuf message; every other result is ``JSON``."""
SAMPLE_RESPONSE = "SampleResponse"

MAX_DECOMPRESSED_BYTES = 256 * 2**20
_ZSTD_STEP_BYTES = 1024
"""Compressed bytes fed at a time: four of them can unfold to 128 KiB, so a step stays under 32 MiB."""

_INT64_MAX = 2**63 - 1

_DTYPES: dict[int, np.dtype] = {pb.DTYPE_FLOAT32: np.dtype("<f4"), pb.DTYPE_INT64: np.dtype("<i8")}


@dataclass(frozen=True)
class FbHeader:
    """What the job table must know of a ``forward_backward`` body."""

    model_id: str
    seq_id: int | None
    num_tokens: int
    forward_only: bool


def read_forward_backward_header(body: bytes, content_type: str, encoding: str | None = None) -> FbHeader:
    """Parse a body once for its header; raises InvalidInput if it can't be parsed or lacks ``model_id``."""
    if _is_protobuf(content_type):
        message = _parse_forward_backward(body, encoding)
        model_id, seq_id, forward_only = message.model_id, int(message.seq_id), message.forward_only
        num_tokens = sum(len(chunk.encoded_text.tokens) // 4 for datum in message.data for chunk in datum.model_input)
    else:
        request = json_bodies.read_forward_backward(decompress(body, encoding))
        model_id, seq_id, forward_only = request.model_id, request.seq_id, request.forward_only
        num_tokens = sum(datum.tokens.size for datum in request.data)
    if not model_id or "\0" in model_id:
        raise InvalidInput("model_id", model_id, "a non-empty string without NUL characters")
    if seq_id is not None and not -_INT64_MAX - 1 <= seq_id <= _INT64_MAX:
        raise InvalidInput("seq_id", seq_id, "a 64-bit integer")
    return FbHeader(model_id, seq_id, num_tokens, forward_only)


def decode_forward_backward(payload: bytes, content_type: str, encoding: str | None = None) -> types.ForwardBackward:
    """A stored body as a request; raises InvalidInput naming the field, for example ``data[3].loss_fn_inputs``."""
    cells = Budget(MAX_DENSE_CELLS)
    config: dict[str, float | str]
    if _is_protobuf(content_type):
        message = _parse_forward_backward(payload, encoding)
        config = dict(message.loss_fn_config)
        for key, value in message.loss_fn_config_v2.items():
            config[key] = value.text if value.WhichOneof("value") == "text" else value.number
        return types.ForwardBackward(
            model_id=message.model_id,
            seq_id=int(message.seq_id),
            data=tuple(_proto_datum(datum, f"data[{i}]", cells) for i, datum in enumerate(message.data)),
            loss_fn=message.loss_fn,
            loss_config=config,
            forward_only=message.forward_only,
        )
    return json_bodies.read_forward_backward(decompress(payload, encoding))


def encode_forward_backward(result: types.ForwardBackwardResult) -> bytes:
    """Result bytes of type ``FORWARD_BACKWARD_OUTPUT``."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    message.metrics.update({key: float(value) for key, value in result.metrics.items()})
    # One record per run of datums with the same trailing shape: ragged K can't share one.
    start = 0
    while start < len(result.logprobs):
        trailing = result.logprobs[start].shape[1:]
        end = start
        while end < len(result.logprobs) and result.logprobs[end].shape[1:] == trailing:
            end += 1
        arrays = [np.ascontiguousarray(array, "<f4") for array in result.logprobs[start:end]]
        record = message.loss_fn_outputs.add(num_datums=len(arrays))
        tensor = record.fields["logprobs"]
        tensor.data = b"".join(array.tobytes() for array in arrays)
        tensor.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8").tobytes()
        tensor.dtype = pb.DTYPE_FLOAT32
        tensor.trailing_shape.extend(trailing)
        start = end
    return message.SerializeToString(deterministic=True)


def encode_sample(result: types.SampleResult) -> bytes:
    """Result bytes of type ``SAMPLE_RESPONSE``."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.ascontiguousarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.ascontiguousarray(sequence.logprobs, "<f4").tobytes(),
            topk_sampled_logprobs=None if sequence.topk is None else _topk(sequence.topk),
        )
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = np.ascontiguousarray(result.prompt_logprobs, "<f4").tobytes()
    if result.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result.topk_prompt_logprobs))
    if result.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_cells(result.target_prompt_logprobs))
    if result.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(_dense(result.prompt_alt_tokens.token_ids, "<i8", pb.DTYPE_INT64))
        message.prompt_alt_tokens.logprobs.CopyFrom(_dense(result.prompt_alt_tokens.logprobs, "<f4", pb.DTYPE_FLOAT32))
    return message.SerializeToString(deterministic=True)


def _topk(topk: types.TopkLogprobs) -> pb.TopkLogprobs:
    ids, logprobs = np.array(topk.token_ids, "<i4"), np.array(topk.logprobs, "<f4")
    # An id without a finite logprob is no candidate: clients know such cells by this one mark.
    absent = ~np.isfinite(logprobs)
    ids[absent], logprobs[absent] = 0, types.ABSENT_LOGPROB
    length, k = ids.shape
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), length=length, k=k)


def _dense(values: np.ndarray, dtype: str, name: pb.DType) -> pb.Tensor:
    return pb.Tensor(dense=np.ascontiguousarray(values, dtype).tobytes(), dtype=name, shape=values.shape)


def _cells(cells: types.Cells) -> pb.Tensor:
    """Float32 cells in the layout that the request had."""
    if cells.csr is None:
        return _dense(cells.values, "<f4", pb.DTYPE_FLOAT32)
    crow, col = cells.csr
    sparse = pb.SparseCsr(
        values=np.ascontiguousarray(cells.values[csr_rows(crow), col], "<f4").tobytes(),
        crow_indices=np.ascontiguousarray(crow, "<i8").tobytes(),
        col_indices=np.ascontiguousarray(col, "<i8").tobytes(),
    )
    return pb.Tensor(sparse_csr=sparse, dtype=pb.DTYPE_FLOAT32, shape=cells.values.shape)


def encode_json(value: dict[str, Any]) -> bytes:
    """Result bytes of type ``JSON``."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def to_json(result: bytes, result_type: str) -> dict[str, Any]:
    """A stored result as the JSON body that SDKs before 0.25 expect (protocol §6)."""
    if result_type == FORWARD_BACKWARD_OUTPUT:
        return json_bodies.output_to_json(pb.ForwardBackwardOutput.FromString(result))
    if result_type == SAMPLE_RESPONSE:
        return json_bodies.sample_to_json(pb.SampleResponse.FromString(result))
    return parse_json(result)


def decompress(body: bytes, encoding: str | None) -> bytes:
    """The plain body; raises TooLarge before a zstd bomb unfolds."""
    if encoding in (None, "", "identity"):
        return body
    if encoding != "zstd":
        raise Unsupported("Content-Encoding", encoding, "zstd or none")
    decoder = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
    parts, num_bytes = [], 0
    try:
        for start in range(0, len(body), _ZSTD_STEP_BYTES):
            parts.append(decoder.decompress(body[start : start + _ZSTD_STEP_BYTES]))
            num_bytes += len(parts[-1])
            if num_bytes > MAX_DECOMPRESSED_BYTES:
                raise TooLarge("body", "more after decompression", f"at most {MAX_DECOMPRESSED_BYTES} bytes")
            if decoder.eof:
                break
    except zstandard.ZstdError as error:
        raise InvalidInput("body", f"broken zstd ({error})", "a whole zstd frame") from error
    if not decoder.eof:
        raise InvalidInput("body", f"zstd truncated after {num_bytes} bytes", "a whole zstd frame")
    return b"".join(parts)


# ---- protobuf requests -----------------------------------------------------------------------------------------


def _is_protobuf(content_type: str) -> bool:
    return content_type.split(";")[0].strip().lower() == PROTOBUF


def _parse_forward_backward(body: bytes, encoding: str | None) -> pb.ForwardBackwardRequest:
    plain = decompress(body, encoding)
    try:
        return pb.ForwardBackwardRequest.FromString(plain)
    except DecodeError as error:
        raise InvalidInput("body", "unparsable protobuf", "a ForwardBackwardRequest message") from error


def _proto_datum(datum: pb.Datum, where: str, cells: Budget) -> types.Datum:
    chunks = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise Unsupported(f"{where}.model_input", f"a chunk of type {kind}", "encoded_text chunks")
        chunks.append(array(chunk.encoded_text.tokens, np.dtype("<i4"), f"{where}.model_input"))
    return types.Datum(
        tokens=np.concatenate(chunks) if chunks else np.zeros(0, np.int32),
        inputs={
            name: as_input(name, _proto_tensor(tensor, f"{where}.loss_fn_inputs.{name}", cells), where)
            for name, tensor in datum.loss_fn_inputs.items()
        },
        token_spans=_spans(datum.model_input_spans, f"{where}.model_input_spans"),
        input_spans=_spans(datum.loss_fn_input_spans, f"{where}.loss_fn_input_spans"),
    )


def _proto_tensor(tensor: pb.Tensor, where: str, cells: Budget) -> np.ndarray:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidInput(f"{where}.dtype", tensor.dtype, "DTYPE_FLOAT32 (1) or DTYPE_INT64 (2)")
    shape = list(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return densify(
            array(tensor.sparse_csr.values, dtype, f"{where}.values"),
            array(tensor.sparse_csr.crow_indices, np.dtype("<i8"), f"{where}.crow_indices"),
            array(tensor.sparse_csr.col_indices, np.dtype("<i8"), f"{where}.col_indices"),
            shape,
            where,
            cells,
        )
    return shaped(array(tensor.dense, dtype, where), shape, where)


def _spans(spans: Any, where: str) -> tuple[types.Span, ...]:
    decoded = []
    for i, span in enumerate(spans):
        kind = span.WhichOneof("span")
        if kind is None:
            raise InvalidInput(f"{where}[{i}]", "an empty span", "prompt_tokens or sampled_tokens")
        inner = getattr(span, kind)
        if inner.offset < 0 or inner.length < 0 or not inner.sequence_id:
            raise InvalidInput(f"{where}[{i}]", str(inner), "a sequence_id, offset >= 0 and length >= 0")
        decoded.append(types.Span(inner.sequence_id, inner.offset, inner.length, sampled=kind == "sampled_tokens"))
    return tuple(decoded)


__all__ = [
    "FORWARD_BACKWARD_OUTPUT",
    "JSON",
    "PROTOBUF",
    "SAMPLE_RESPONSE",
    "FbHeader",
    "decode_forward_backward",
    "decode_sample",
    "decompress",
    "encode_forward_backward",
    "encode_json",
    "encode_sample",
    "parse_json",
    "read_forward_backward_header",
    "to_json",
]
