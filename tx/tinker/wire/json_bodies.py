"""JSON bodies: ``asample`` of every SDK, and the training requests and results of SDKs before 0.25 (protocol §6).

Old clients leave out unset defaults and ``type`` tags, and send explicit nulls: both read as the default here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from tx import types
from tx.errors import InvalidInput, Unsupported
from tx.tinker.wire import tinker_pb2 as pb
from tx.tinker.wire.tensors import MAX_DENSE_CELLS, Budget, as_input, csr_rows, densify, shaped

_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def parse_json(payload: bytes) -> dict[str, Any]:
    """A JSON object; raises InvalidInput for anything else (NaN and Infinity included)."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise InvalidInput("body", f"unparsable JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise InvalidInput("body", value, "a JSON object")
    return value


# ---- training ---------------------------------------------------------------------------------------------------


def read_forward_backward(plain: bytes) -> types.ForwardBackward:
    """A body of ``/forward_backward`` or ``/forward``; the latter's payload is named ``forward_input``."""
    request = parse_json(plain)
    forward_only = "forward_input" in request
    inner = _member(request, "forward_input" if forward_only else "forward_backward_input", dict)
    config = _optional(inner, "loss_fn_config", dict, {})
    if not all(isinstance(value, int | float | str) and not isinstance(value, bool) for value in config.values()):
        raise InvalidInput("loss_fn_config", config, "an object of numbers and strings")
    cells = Budget(MAX_DENSE_CELLS)
    return types.ForwardBackward(
        model_id=_member(request, "model_id", str),
        seq_id=_optional(request, "seq_id", int, 0),
        data=tuple(_datum(datum, f"data[{i}]", cells) for i, datum in enumerate(_member(inner, "data", list))),
        loss_fn=_member(inner, "loss_fn", str),
        loss_config=config,
        forward_only=forward_only,
    )


def _datum(datum: Any, where: str, cells: Budget) -> types.Datum:
    if not isinstance(datum, dict):
        raise InvalidInput(where, datum, "an object")
    inputs = _member(datum, "loss_fn_inputs", dict, where)
    return types.Datum(
        tokens=_tokens(_member(datum, "model_input", dict, where), f"{where}.model_input"),
        inputs={
            name: as_input(name, _tensor(tensor, f"{where}.loss_fn_inputs.{name}", cells), where)
            for name, tensor in inputs.items()
        },
    )


def _tensor(tensor: Any, where: str, cells: Budget, unlisted: int = 0) -> np.ndarray:
    if not isinstance(tensor, dict):
        raise InvalidInput(where, tensor, "an object with data and dtype")
    dtype = _DTYPES.get(str(tensor.get("dtype")))
    if dtype is None:
        raise InvalidInput(f"{where}.dtype", tensor.get("dtype"), '"float32" or "int64"')
    values = _numbers(tensor.get("data"), f"{where}.data", dtype)
    shape = _numbers(tensor.get("shape") or [], f"{where}.shape", np.dtype("<i8")).tolist()
    crow, col = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
    if crow is None:
        return shaped(values, shape, where)
    index: np.dtype = np.dtype("<i8")
    return densify(
        values, _numbers(crow, f"{where}.crow_indices", index), _numbers(col, f"{where}.col_indices", index), shape,
        where, cells, unlisted,
    )  # fmt: skip


def _numbers(values: Any, where: str, dtype: np.dtype) -> np.ndarray:
    accepted = "a flat list of integers" if dtype.kind == "i" else "a flat list of numbers"
    if not isinstance(values, list):
        raise InvalidInput(where, values, accepted)
    kinds: type | tuple[type, ...] = int if dtype.kind == "i" else (int, float)
    if not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        raise InvalidInput(where, values, accepted)
    try:
        return np.array(values, dtype)
    except OverflowError as error:
        raise InvalidInput(where, "a number out of range", f"{dtype.name} values") from error


# ---- sampling ---------------------------------------------------------------------------------------------------


def decode_sample(payload: bytes) -> types.SampleRequest:
    """An ``asample`` body as a request; what tx doesn't serve is refused by name, never ignored."""
    request = parse_json(payload)
    last_n = _optional(request, "prompt_logprobs_last_n", int, None)
    if last_n is not None and last_n < 1:
        raise InvalidInput("prompt_logprobs_last_n", last_n, "at least 1, or absent for the whole prompt")
    return types.SampleRequest(
        prompt=_tokens(_member(request, "prompt", dict), "prompt"),
        num_samples=_optional(request, "num_samples", int, 1),
        params=_sampling_params(_optional(request, "sampling_params", dict, {})),
        prompt_logprobs=_optional(request, "prompt_logprobs", bool, False),
        topk_prompt_logprobs=_optional(request, "topk_prompt_logprobs", int, 0),
        record_stability_info=_optional(request, "record_stability_info", bool, False),
        prompt_logprobs_last_n=last_n or 0,
        topk_sample_logprobs=_optional(request, "topk_sample_logprobs", int, 0),
        target_prompt_logprobs=_target_ids(request.get("target_prompt_logprobs")),
        prompt_alt_tokens_k=_optional(request, "prompt_alt_tokens_k", int, 0),
    )


def _target_ids(tensor: Any) -> types.Cells | None:
    """Ids to score, -1 where the request asks for nothing, with the layout that the answer must have too."""
    if tensor is None:
        return None
    where = "target_prompt_logprobs"
    ids = _tensor(tensor, where, Budget(MAX_DENSE_CELLS), unlisted=-1)
    if ids.dtype.kind != "i":
        raise InvalidInput(f"{where}.dtype", ids.dtype.name, "int64")
    if tensor.get("sparse_crow_indices") is None:
        return types.Cells(ids)
    crow, col = (np.asarray(tensor[f"sparse_{name}_indices"], "<i8") for name in ("crow", "col"))
    # Two values in one cell could not both be answered.
    if np.any((np.diff(col) <= 0) & (np.diff(csr_rows(crow)) == 0)):
        raise InvalidInput(f"{where}.col_indices", "unordered or repeated columns", "rising columns in each row")
    return types.Cells(ids, (crow, col))


def _sampling_params(params: dict[str, Any]) -> types.SamplingParams:
    where = "sampling_params"
    seed = _optional(params, "seed", int, 0, where)
    if not -_INT64_MAX - 1 <= seed <= _INT64_MAX:
        raise InvalidInput("sampling_params.seed", seed, "a 64-bit integer")
    strings, ids, on_eos = _stops(params.get("stop"))
    return types.SamplingParams(
        max_tokens=_optional(params, "max_tokens", int, None, where),
        seed=seed,
        temperature=float(_optional(params, "temperature", (int, float), 1.0, where)),
        top_k=_optional(params, "top_k", int, -1, where),
        top_p=float(_optional(params, "top_p", (int, float), 1.0, where)),
        stop_token_ids=ids,
        stop_strings=strings,
        stop_on_eos=on_eos,
    )


def _stops(stop: Any) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """Stop strings, stop token ids, and whether EOS stops: only an explicit empty list turns it off (protocol §3.7)."""
    accepted = "a non-empty string, a list of them, or a list of token ids"
    if stop is None:
        return (), (), True
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list):
        raise InvalidInput("sampling_params.stop", stop, accepted)
    if all(isinstance(item, str) and item for item in stop):
        return tuple(stop), (), bool(stop)
    if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _INT32_MAX for item in stop):
        return (), tuple(stop), True
    raise InvalidInput("sampling_params.stop", stop, accepted)


# ---- results ----------------------------------------------------------------------------------------------------


def output_to_json(message: pb.ForwardBackwardOutput) -> dict[str, Any]:
    """A ``ForwardBackwardOutput`` that we encoded, as old SDKs read it."""
    outputs: list[dict[str, Any]] = []
    for record in message.loss_fn_outputs:
        for i in range(record.num_datums):
            datum = {}
            for name, tensor in record.fields.items():
                start, end = np.frombuffer(tensor.offsets, "<i8")[i : i + 2]
                values = np.frombuffer(tensor.data[start:end], "<f4")
                # Computed, because reshape's -1 is ambiguous for an empty array.
                rows = values.size // max(1, int(np.prod(tensor.trailing_shape)))
                shape = [rows, *tensor.trailing_shape]
                datum[name] = {"data": values.tolist(), "dtype": "float32", "shape": shape}
            outputs.append(datum)
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": outputs,
        "metrics": dict(message.metrics),
    }


def sample_to_json(message: pb.SampleResponse) -> dict[str, Any]:
    """A ``SampleResponse`` as old SDKs read it, by its field names: missing logprobs are null."""
    body: dict[str, Any] = {"type": "sample", "sequences": [_sequence_to_json(each) for each in message.sequences]}
    if message.HasField("prompt_logprobs"):
        logprobs = np.frombuffer(message.prompt_logprobs, "<f4")
        body["prompt_logprobs"] = [None if np.isnan(value) else float(value) for value in logprobs]
    if message.HasField("topk_prompt_logprobs"):
        body["topk_prompt_logprobs"] = _topk_to_json(message.topk_prompt_logprobs)
    if message.HasField("target_prompt_logprobs"):
        body["target_prompt_logprobs"] = _tensor_to_json(message.target_prompt_logprobs)
    if message.HasField("prompt_alt_tokens"):
        alternatives = message.prompt_alt_tokens
        body["prompt_alt_tokens"] = {
            "tokens": _tensor_to_json(alternatives.tokens),
            "logprobs": _tensor_to_json(alternatives.logprobs),
        }
    return body


def _sequence_to_json(sequence: pb.SampledSequence) -> dict[str, Any]:
    body: dict[str, Any] = {
        "stop_reason": "stop" if sequence.stop_reason == pb.STOP_REASON_STOP else "length",
        "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
        "logprobs": np.frombuffer(sequence.logprobs, "<f4").tolist(),
    }
    if sequence.HasField("topk_sampled_logprobs"):
        body["topk_sampled_logprobs"] = _topk_to_json(sequence.topk_sampled_logprobs)
    return body


def _topk_to_json(topk: pb.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    """Pairs of id and logprob per position, without absent cells; null for a position that has no other."""
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k)
    logprobs = np.frombuffer(topk.logprobs, "<f4").reshape(topk.length, topk.k)
    there = logprobs != np.float32(types.ABSENT_LOGPROB)
    return [
        list(zip(ids[i, there[i]].tolist(), logprobs[i, there[i]].tolist(), strict=True)) or None
        for i in range(topk.length)
    ]


def _tensor_to_json(tensor: pb.Tensor) -> dict[str, Any]:
    """A ``Tensor`` that we encoded as ``TensorData``."""
    dtype = "int64" if tensor.dtype == pb.DTYPE_INT64 else "float32"
    sparse = tensor.WhichOneof("encoding") == "sparse_csr"
    values = np.frombuffer(tensor.sparse_csr.values if sparse else tensor.dense, _DTYPES[dtype])
    body: dict[str, Any] = {"data": values.tolist(), "dtype": dtype, "shape": list(tensor.shape)}
    if sparse:
        body["sparse_crow_indices"] = np.frombuffer(tensor.sparse_csr.crow_indices, "<i8").tolist()
        body["sparse_col_indices"] = np.frombuffer(tensor.sparse_csr.col_indices, "<i8").tolist()
    return body


# ---- fields -----------------------------------------------------------------------------------------------------


def _tokens(model_input: dict[str, Any], where: str) -> np.ndarray:
    """The int32 tokens of a ``ModelInput``'s chunks, one after the other."""
    parts = []
    for chunk in _member(model_input, "chunks", list, where):
        if not isinstance(chunk, dict):
            raise InvalidInput(f"{where}.chunks", chunk, "objects")
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise Unsupported(f"{where}.chunks.type", chunk["type"], "encoded_text")
        parts.append(_numbers(chunk.get("tokens"), f"{where}.chunks.tokens", np.dtype("<i8")))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if tokens.size and (tokens.min() < -_INT32_MAX or tokens.max() > _INT32_MAX):
        raise InvalidInput(f"{where}.chunks.tokens", "a number out of range", "int32 token ids")
    return tokens.astype(np.int32)


def _member(value: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    member = value.get(name)
    if not isinstance(member, kind):
        raise InvalidInput(f"{where}.{name}" if where else name, member, f"a JSON {_NAMES[kind]}")
    return member


def _optional(value: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any, where: str = "") -> Any:
    """The member, or ``default`` if it is absent or null; bools are not numbers."""
    member = value.get(name)
    if member is None:
        return default
    if not isinstance(member, kind) or (isinstance(member, bool) and kind is not bool):
        accepted = "number" if isinstance(kind, tuple) else _NAMES[kind]
        raise InvalidInput(f"{where}.{name}" if where else name, member, f"a JSON {accepted}")
    return member


_NAMES = {dict: "object", list: "array", str: "string", int: "integer", bool: "boolean"}
