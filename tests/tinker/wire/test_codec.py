"""Wire samples of the protocol document and recorded bodies, both ways, and what is refused by name."""

import importlib
import json
import math

import numpy as np
import orjson
import pytest
import zstandard

from tx import types
from tx.errors import InvalidInput, TooLarge, Unsupported
from tx.tinker.wire import codec
from tx.tinker.wire import tinker_pb2 as pb

REQUEST = bytes.fromhex(
    "0a09733a747261696e3a3010011a540a0c0a0a0a080100000002000000"
    "12280a0d7461726765745f746f6b656e7312170a100200000000000000030000000000000018022201021"
    "21a0a0777656967687473120f0a08000000000000803f1801220102220d63726f73735f656e74726f7079"
)
OUTPUT = bytes.fromhex(
    "0a0b41727261795265636f7264122e122a0a086c6f6770726f6273121e0a08000080bf000000c01210"
    "0000000000000000080000000000000018011801"
    "1a130a086c6f73733a73756d110000000000000040"
)
SAMPLE = bytes.fromhex("0a160801120807000000080000001a08000000bf000080bf")


def message(**tensors) -> pb.ForwardBackwardRequest:
    request = pb.ForwardBackwardRequest(model_id="s:train:0", seq_id=1, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(3, dtype=np.int32).tobytes()
    for name, tensor in tensors.items():
        datum.loss_fn_inputs[name].CopyFrom(tensor)
    return request


def decode(request: pb.ForwardBackwardRequest) -> types.ForwardBackward:
    return codec.decode_forward_backward(request.SerializeToString(), codec.PROTOBUF)


def csr(values, crow, col, shape, dtype=np.int64) -> pb.Tensor:
    tensor = pb.Tensor(dtype=pb.DTYPE_INT64 if dtype is np.int64 else pb.DTYPE_FLOAT32, shape=shape)
    tensor.sparse_csr.values = np.array(values, dtype).tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.array(col, np.int64).tobytes()
    return tensor


# ---- forward_backward, request ----


def test_the_documented_request_decodes():
    request = codec.decode_forward_backward(REQUEST, "application/x-protobuf")
    assert (request.model_id, request.seq_id, request.loss_fn, request.forward_only) == (
        "s:train:0", 1, "cross_entropy", False,
    )  # fmt: skip
    (datum,) = request.data
    assert datum.tokens.dtype == np.int32
    assert datum.tokens.tolist() == [1, 2]
    assert datum.inputs["target_tokens"].dtype == np.int64
    assert datum.inputs["target_tokens"].tolist() == [2, 3]
    assert datum.inputs["weights"].dtype == np.float32
    assert datum.inputs["weights"].tolist() == [0, 1]
    header = codec.read_forward_backward_header(REQUEST, "application/x-protobuf")
    assert header == codec.FbHeader("s:train:0", 1, 2, False)


def test_old_clients_json_decodes_to_the_same_request():
    body = {  # as SDK 0.3.0 sends it: no type tags, explicit null
        "forward_backward_input": {
            "data": [{
                "loss_fn_inputs": {
                    "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                    "weights": {"data": [0.0, 1.0], "dtype": "float32", "shape": [2]},
                },
                "model_input": {"chunks": [{"tokens": [1, 2]}]},
            }],
            "loss_fn": "cross_entropy",
            "loss_fn_config": None,
        },
        "model_id": "s:train:0",
        "seq_id": 1,
    }  # fmt: skip
    old = codec.decode_forward_backward(orjson.dumps(body), "application/json")
    new = codec.decode_forward_backward(REQUEST, "application/x-protobuf")
    assert (old.model_id, old.seq_id, old.loss_fn, old.loss_config) == (new.model_id, 1, new.loss_fn, {})
    np.testing.assert_array_equal(old.data[0].tokens, new.data[0].tokens)
    for name in ("target_tokens", "weights"):
        np.testing.assert_array_equal(old.data[0].inputs[name], new.data[0].inputs[name])
        assert old.data[0].inputs[name].dtype == new.data[0].inputs[name].dtype
    body["forward_input"] = body.pop("forward_backward_input")
    assert codec.decode_forward_backward(orjson.dumps(body), "application/json").forward_only
    header = codec.read_forward_backward_header(orjson.dumps(body), "application/json; charset=utf-8")
    assert header == codec.FbHeader("s:train:0", 1, 2, True)


def test_v2_config_wins_over_the_legacy_mirror():
    request = message()
    request.loss_fn_config["beta"] = 0.5
    request.loss_fn_config_v2["beta"].number = 0.25
    request.loss_fn_config_v2["loss_id"].text = "loss-1"
    assert decode(request).loss_config == {"beta": 0.25, "loss_id": "loss-1"}


def test_sparse_targets_become_dense_with_zeros():
    request = decode(message(target_tokens=csr([5, 6, 7], [0, 1, 1, 3], [1, 0, 1], [3, 2])))
    assert request.data[0].inputs["target_tokens"].tolist() == [[0, 5], [0, 0], [6, 7]]


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"\0" * 7), "weights: "),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"\0" * 12, shape=[4]), "weights.shape"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"\0" * 12, shape=[-1, -3]), "weights.shape"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"\0" * 12, shape=[3, 1, 1]), "weights.shape"),
        (pb.Tensor(dtype=pb.DTYPE_BFLOAT16, dense=b"\0" * 6), "weights.dtype"),
        (pb.Tensor(dense=b"\0" * 6), "weights.dtype"),
        (csr([1], [0, 1, 1], [0], [3, 2], np.float32), "weights.crow_indices"),
        (csr([1], [0, 2, 1, 1], [0], [3, 2], np.float32), "weights.crow_indices"),
        (csr([1], [1, 1, 1, 1], [0], [3, 2], np.float32), "weights.crow_indices"),
        (csr([1], [0, 1, 1, 1], [2], [3, 2], np.float32), "weights.col_indices"),
        (csr([1], [0, 1, 1, 1], [-1], [3, 2], np.float32), "weights.col_indices"),
        (csr([1], [0, 1, 1, 1], [0, 0], [3, 2], np.float32), "weights.col_indices"),
        (csr([1], [0, 1], [0], [3], np.float32), "weights.shape"),
    ],
)
def test_a_broken_tensor_is_refused_by_name(tensor, field):
    with pytest.raises(InvalidInput, match=r"data\[0\]\.loss_fn_inputs\." + field):
        decode(message(weights=tensor))


def test_float_targets_and_images_are_refused():
    with pytest.raises(InvalidInput, match=r"target_tokens\.dtype"):
        decode(message(target_tokens=pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"\0" * 12)))
    request = message()
    request.data[0].model_input.add().image.data = b"png"
    with pytest.raises(Unsupported, match=r"data\[0\].model_input: got 'a chunk of type image'|a chunk of type image"):
        decode(request)


def test_a_csr_bomb_is_refused_before_it_unfolds():
    with pytest.raises(TooLarge, match="weights"):
        decode(message(weights=csr([1], [0, 1, 1, 1], [0], [3, 2**40], np.float32)))


def test_provenance_spans_keep_their_kind_and_order():
    request = message()
    request.data[0].loss_fn_input_spans.add().prompt_tokens.CopyFrom(
        pb.PromptProvenanceSpan(sequence_id="7-0", offset=1, length=2)
    )
    request.data[0].loss_fn_input_spans.add().sampled_tokens.CopyFrom(
        pb.SampledProvenanceSpan(sequence_id="7-0", length=1)
    )
    assert decode(request).data[0].input_spans == (types.Span("7-0", 1, 2, False), types.Span("7-0", 0, 1, True))
    request.data[0].model_input_spans.add()
    with pytest.raises(InvalidInput, match=r"data\[0\].model_input_spans\[0\]"):
        decode(request)


@pytest.mark.parametrize("content_type", ["application/x-protobuf", "application/json"])
def test_garbage_is_refused(content_type):
    with pytest.raises(InvalidInput, match="body"):
        codec.read_forward_backward_header(b"\xff\xfe garbage", content_type)


def test_a_request_without_a_model_is_refused():
    with pytest.raises(InvalidInput, match="model_id"):
        codec.read_forward_backward_header(b"", "application/x-protobuf")


# ---- zstd ----


@pytest.mark.parametrize("sized", [True, False])
def test_zstd_round_trip_and_truncation(sized):
    body = zstandard.ZstdCompressor(write_content_size=sized).compress(REQUEST * 50)
    assert codec.decompress(body, "zstd") == REQUEST * 50
    with pytest.raises(InvalidInput, match="zstd truncated"):
        codec.decompress(body[:-3], "zstd")
    with pytest.raises(InvalidInput, match="broken zstd"):
        codec.decompress(b"not zstd at all", "zstd")
    with pytest.raises(InvalidInput, match="Content-Encoding"):
        codec.decompress(body, "br")


def test_a_zstd_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_DECOMPRESSED_BYTES", 2**22)
    bomb = zstandard.ZstdCompressor().compress(bytes(2**23))
    assert len(bomb) < 2000
    with pytest.raises(TooLarge, match="body"):
        codec.decompress(bomb, "zstd")


# ---- results ----


def test_forward_backward_output_is_the_documented_bytes():
    result = types.ForwardBackwardResult([np.array([-1, -2], np.float32)], {"loss:sum": 2.0})
    assert codec.encode_forward_backward(result) == OUTPUT
    assert codec.to_json(OUTPUT, codec.FORWARD_BACKWARD_OUTPUT) == {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [{"logprobs": {"data": [-1.0, -2.0], "dtype": "float32", "shape": [2]}}],
        "metrics": {"loss:sum": 2.0},
    }


def test_sample_response_is_the_documented_bytes():
    sequence = types.SampledSequence(np.array([7, 8], np.int32), np.array([-0.5, -1], np.float32), "length")
    assert codec.encode_sample(types.SampleResult([sequence])) == SAMPLE
    assert codec.to_json(SAMPLE, codec.SAMPLE_RESPONSE) == {
        "type": "sample",
        "sequences": [{"stop_reason": "length", "tokens": [7, 8], "logprobs": [-0.5, -1.0]}],
    }


def full_sample() -> types.SampleResult:
    ids = np.array([[9, 9], [3, 4], [5, 6]], np.int32)
    logprobs = np.array([[np.nan, np.nan], [-0.25, -2], [-0.5, -np.inf]], np.float32)
    return types.SampleResult(
        [types.SampledSequence(np.array([7], np.int32), np.array([-0.5], np.float32), "stop")],
        prompt_logprobs=np.array([np.nan, -0.25, -0.5], np.float32),
        topk_prompt_logprobs=types.TopkLogprobs(ids, logprobs),
    )


def extras(csr=None) -> types.SampleResult:
    """A prompt of three tokens with everything that can be asked of one, and two sequences with their best tokens."""
    topk = types.TopkLogprobs(
        np.array([[1, 2, 3], [4, 5, 6]], np.int32), np.array([[-0.1, -2, -3], [-0.2, -4, -np.inf]], np.float32)
    )
    logprobs, tokens = np.array([-0.5, -1], np.float32), np.array([7, 8], np.int32)
    return types.SampleResult(
        [
            types.SampledSequence(tokens, logprobs, "stop", topk),
            types.SampledSequence(tokens, logprobs, "length", topk),
        ],
        prompt_logprobs=np.array([np.nan, np.nan, -0.5], np.float32),
        topk_prompt_logprobs=types.TopkLogprobs(
            np.array([[0], [0], [5]], np.int32), np.array([[-99999], [-99999], [-0.5]], np.float32)
        ),
        prompt_cache_hit_tokens=2,
        target_prompt_logprobs=types.Cells(np.array([[0, 0, -3], [-4, 0, 0]], np.float32), csr),
        prompt_alt_tokens=types.PromptAltTokens(
            np.array([[11, 12], [13, 14]]), np.array([[-1, -2], [-3, -4]], np.float32)
        ),
    )


CSR = (np.array([0, 1, 3]), np.array([2, 0, 1]))
"""Two listed cells with a logprob and one that asked for nothing."""


def test_extras_as_json():
    body = codec.to_json(codec.encode_sample(extras()), codec.SAMPLE_RESPONSE)
    best = [[(1, np.float32(-0.1)), (2, -2.0), (3, -3.0)], [(4, np.float32(-0.2)), (5, -4.0)]]
    assert [sequence["topk_sampled_logprobs"] for sequence in body["sequences"]] == [best, best]
    assert body["prompt_logprobs"] == [None, None, -0.5]
    assert body["topk_prompt_logprobs"] == [None, None, [(5, -0.5)]]
    assert body["target_prompt_logprobs"] == {"data": [0, 0, -3, -4, 0, 0], "dtype": "float32", "shape": [2, 3]}
    assert body["prompt_alt_tokens"] == {
        "tokens": {"data": [11, 12, 13, 14], "dtype": "int64", "shape": [2, 2]},
        "logprobs": {"data": [-1, -2, -3, -4], "dtype": "float32", "shape": [2, 2]},
    }
    sparse = codec.to_json(codec.encode_sample(extras(CSR)), codec.SAMPLE_RESPONSE)["target_prompt_logprobs"]
    assert sparse == {
        "data": [-3, -4, 0], "dtype": "float32", "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 3], "sparse_col_indices": [2, 0, 1],
    }  # fmt: skip
    orjson.dumps(body)


def test_prompt_logprobs_as_json_have_null_first():
    body = codec.to_json(codec.encode_sample(full_sample()), codec.SAMPLE_RESPONSE)
    assert body["prompt_logprobs"] == [None, -0.25, -0.5]
    assert body["topk_prompt_logprobs"] == [None, [(3, -0.25), (4, -2.0)], [(5, -0.5)]]


def test_ragged_targets_take_one_record_per_shape():
    shapes = [(2,), (3,), (2, 4), (1, 4), (2, 5)]
    result = types.ForwardBackwardResult([np.ones(shape, np.float32) for shape in shapes], {"loss:sum": 0.0})
    output = pb.ForwardBackwardOutput.FromString(codec.encode_forward_backward(result))
    assert [(list(r.fields["logprobs"].trailing_shape), r.num_datums) for r in output.loss_fn_outputs] == [
        ([], 2), ([4], 2), ([5], 1),
    ]  # fmt: skip
    body = codec.to_json(codec.encode_forward_backward(result), codec.FORWARD_BACKWARD_OUTPUT)
    assert [tuple(datum["logprobs"]["shape"]) for datum in body["loss_fn_outputs"]] == shapes


# ---- asample ----


def sample_body(**changes) -> bytes:
    body = {  # as SDK 0.38.0 sends it
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}, {"tokens": [3], "type": "encoded_text"}]},
        "sampling_params": {
            "max_tokens": 5,
            "seed": 1,
            "stop": ["\n\n"],
            "temperature": 0.7,
            "top_k": -1,
            "top_p": 1.0,
        },
        "sampling_session_id": "sess-1:sample:0",
        "seq_id": 827701264000000000,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
    }
    params = changes.pop("params", None)
    if params is not None:
        body["sampling_params"] = params
    return json.dumps({**body, **changes}).encode()


def test_asample_decodes():
    request = codec.decode_sample(sample_body(record_stability_info=True))
    assert request.prompt.dtype == np.int32
    assert request.prompt.tolist() == [1, 2, 3]
    assert (request.num_samples, request.prompt_logprobs, request.topk_prompt_logprobs) == (2, True, 2)
    assert request.record_stability_info
    assert request.params == types.SamplingParams(5, 1, 0.7, -1, 1.0, (), ("\n\n",), True)


def test_asample_of_the_oldest_client_takes_the_defaults():
    body = orjson.dumps({"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 3}})
    request = codec.decode_sample(body)
    prompt = np.array([1], np.int32)
    assert request == types.SampleRequest(request.prompt, 1, types.SamplingParams(max_tokens=3))
    np.testing.assert_array_equal(request.prompt, prompt)


def test_extras_of_asample_decode():
    wishes = {"topk_sample_logprobs": 3, "prompt_alt_tokens_k": 4, "prompt_logprobs_last_n": 1}
    request = codec.decode_sample(sample_body(**wishes))
    assert (request.topk_sample_logprobs, request.prompt_alt_tokens_k, request.prompt_logprobs_last_n) == (3, 4, 1)
    assert request.target_prompt_logprobs is None


def test_targets_of_asample_keep_their_layout():
    dense = {"data": [5, -1, -1, 6], "dtype": "int64", "shape": [2, 2]}
    cells = codec.decode_sample(sample_body(target_prompt_logprobs=dense)).target_prompt_logprobs
    assert (cells.values.dtype, cells.values.tolist(), cells.csr) == (np.int64, [[5, -1], [-1, 6]], None)
    sparse = {
        "data": [5, -1, 0], "dtype": "int64", "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 3], "sparse_col_indices": [2, 0, 1],
    }  # fmt: skip
    cells = codec.decode_sample(sample_body(target_prompt_logprobs=sparse)).target_prompt_logprobs
    assert cells.values.tolist() == [[-1, -1, 5], [-1, 0, -1]]  # unlisted is unset, a listed 0 is token 0
    assert [indices.tolist() for indices in cells.csr] == [[0, 1, 3], [2, 0, 1]]


def sparse_target(**changes):
    good = {
        "data": [5, 6], "dtype": "int64", "shape": [2, 3], "sparse_crow_indices": [0, 2, 2],
        "sparse_col_indices": [0, 1],
    }  # fmt: skip
    return {"target_prompt_logprobs": good | changes}


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, ((), (), True)),
        ("ab", (("ab",), (), True)),
        (["a", "b"], (("a", "b"), (), True)),
        ([7, 8], ((), (7, 8), True)),
        ([], ((), (), False)),
    ],
)
def test_forms_of_stop(stop, expected):
    params = codec.decode_sample(sample_body(params={"stop": stop})).params
    assert (params.stop_strings, params.stop_token_ids, params.stop_on_eos) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"topk_sample_logprobs": "three"}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": True}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs_last_n": -3}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": [[5]]}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [1.0], "dtype": "float32"}}, "target_prompt_logprobs.dtype"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [2]}}, "target_prompt_logprobs.shape"),
        (sparse_target(sparse_col_indices=[1, 0]), "target_prompt_logprobs.col_indices"),
        (sparse_target(sparse_col_indices=[1, 1]), "target_prompt_logprobs.col_indices"),
        (sparse_target(sparse_col_indices=None), "target_prompt_logprobs.col_indices"),
        (sparse_target(sparse_crow_indices=[0, 2]), "target_prompt_logprobs.crow_indices"),
        (sparse_target(shape=None), "target_prompt_logprobs.shape"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "prompt.chunks.type"),
        ({"prompt": {"chunks": [{"tokens": [1.5]}]}}, "prompt.chunks.tokens"),
        ({"prompt": {"chunks": [{"tokens": [2**40]}]}}, "prompt.chunks.tokens"),
        ({"prompt": {"chunks": [{"tokens": [2**70]}]}}, "body|prompt.chunks.tokens"),
        ({"prompt": {"chunks": 3}}, "prompt.chunks"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"num_samples": "two"}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"params": {"stop": 3}}, "sampling_params.stop"),
        ({"params": {"stop": ["a", 3]}}, "sampling_params.stop"),
        ({"params": {"stop": [""]}}, "sampling_params.stop"),
        ({"params": {"stop": [-1]}}, "sampling_params.stop"),
        ({"params": {"seed": 2**63}}, "sampling_params.seed"),
        ({"params": {"seed": 1.5}}, "sampling_params.seed"),
        ({"params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ],
)
def test_c12_what_asample_cannot_serve_is_refused_by_name(changes, field):
    with pytest.raises(InvalidInput, match=rf"^({field})[:. ]"):
        codec.decode_sample(sample_body(**changes))


# ---- against the SDK's own schema, where it is installed ----


@pytest.fixture
def sdk():
    """The SDK's generated module; its conversion helpers sit beside it."""
    return pytest.importorskip("tinker.proto.tinker_public_pb2", reason="the official SDK is not installed")


def test_field_numbers_are_the_sdks(sdk):
    for name, ours in pb.DESCRIPTOR.message_types_by_name.items():
        theirs = sdk.DESCRIPTOR.message_types_by_name[name]
        assert {f.name: (f.number, f.type, f.is_repeated) for f in ours.fields} == {
            f.name: (f.number, f.type, f.is_repeated) for f in theirs.fields
        }, name
    for name, ours in pb.DESCRIPTOR.enum_types_by_name.items():
        theirs = sdk.DESCRIPTOR.enum_types_by_name[name]
        assert {v.name: v.number for v in ours.values} == {v.name: v.number for v in theirs.values}


def test_the_sdk_reads_our_results(sdk):
    conv = importlib.import_module("tinker.proto.response_conv")
    shapes = [(2,), (2, 4), (1, 4)]
    arrays = [np.arange(math.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    output = conv.deserialize_forward_backward_output(
        codec.encode_forward_backward(types.ForwardBackwardResult(arrays, {"loss:sum": 2.0}))
    )
    for array, datum in zip(arrays, output.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(datum["logprobs"].to_numpy(), array)
    sample = conv.deserialize_sample_response(codec.encode_sample(full_sample()))
    assert sample.sequences[0].stop_reason == "stop"
    assert sample.sequences[0].tokens == [7]
    assert sample.prompt_logprobs == [None, -0.25, -0.5]


@pytest.mark.parametrize("csr", [None, CSR], ids=["dense", "sparse"])
def test_the_sdk_reads_our_extras(sdk, csr):
    conv = importlib.import_module("tinker.proto.response_conv")
    sample = conv.deserialize_sample_response(codec.encode_sample(extras(csr)))
    for sequence in sample.sequences:
        assert [[id for id, _ in row] for row in sequence.topk_logprobs] == [[1, 2, 3], [4, 5]]
        np.testing.assert_array_equal(sequence.topk_logprobs_np.logprobs[0], np.array([-0.1, -2, -3], np.float32))
    assert sample.prompt_logprobs == [None, None, -0.5]
    assert sample.topk_prompt_logprobs == [None, None, [(5, -0.5)]]
    assert sample.prompt_cache_hit_tokens == 2
    target = sample.target_prompt_logprobs
    assert (target.dtype, target.shape) == ("float32", [2, 3])
    if csr is None:
        assert target.to_numpy().tolist() == [[0, 0, -3], [-4, 0, 0]]
    else:
        assert (target.sparse_crow_indices, target.sparse_col_indices) == ([0, 1, 3], [2, 0, 1])
        assert list(target.data) == [-3, -4, 0]
    alternatives = sample.prompt_alt_tokens
    assert (alternatives.tokens.dtype, alternatives.logprobs.dtype) == ("int64", "float32")
    assert alternatives.tokens.to_numpy().tolist() == [[11, 12], [13, 14]]
    assert alternatives.logprobs.to_numpy().tolist() == [[-1, -2], [-3, -4]]


def test_the_sdk_reads_the_alternatives_to_a_prompt_of_one_token(sdk):
    conv = importlib.import_module("tinker.proto.response_conv")
    none = types.PromptAltTokens(np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32))
    sample = conv.deserialize_sample_response(codec.encode_sample(types.SampleResult([], prompt_alt_tokens=none)))
    assert sample.prompt_alt_tokens.tokens.shape == [0, 2]


def test_what_the_sdk_asks_for_decodes(sdk):
    """Through the SDK's own request type and the JSON it sends."""
    tinker_types = importlib.import_module("tinker.types")
    client = importlib.import_module("tinker.lib.public_interfaces.sampling_client")
    target = tinker_types.TensorData(
        data=[5, 0], dtype="int64", shape=[2, 4], sparse_crow_indices=[0, 0, 2], sparse_col_indices=[1, 3]
    )
    body = tinker_types.SampleRequest(
        prompt=tinker_types.ModelInput.from_ints([1, 2, 3]),
        sampling_params=tinker_types.SamplingParams(max_tokens=1),
        prompt_logprobs=True,
        prompt_logprobs_last_n=2,
        topk_sample_logprobs=3,
        prompt_alt_tokens_k=4,
        target_prompt_logprobs=client._tensor_data_to_model(target),
    ).model_dump_json(exclude_none=True)
    request = codec.decode_sample(body.encode())
    assert (request.prompt_logprobs_last_n, request.topk_sample_logprobs, request.prompt_alt_tokens_k) == (2, 3, 4)
    assert request.target_prompt_logprobs.values.tolist() == [[-1] * 4, [-1, 5, -1, 0]]
