"""The models of training bodies and results say what ``json_bodies`` reads and writes."""

from __future__ import annotations

import json

import numpy as np

from tx import types
from tx.tinker.wire import codec
from tx.tinker.wire.results import ForwardBackwardResult, SampleResult, TrainingBody

BODY = {
    "model_id": "s:train:0",
    "seq_id": 1,
    "forward_backward_input": {
        "data": [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]}},
            }
        ],
        "loss_fn": "cross_entropy",
        "loss_fn_config": None,
    },
}


def test_a_body_of_the_model_is_read():
    body = TrainingBody.model_validate(BODY).model_dump_json().encode()
    header = codec.read_forward_backward_header(body, codec.JSON)
    assert (header.model_id, header.seq_id, header.num_tokens) == ("s:train:0", 1, 2)
    assert codec.decode_forward_backward(json.dumps(BODY).encode(), codec.JSON).loss_fn == "cross_entropy"


def test_results_are_of_the_models():
    trained = types.ForwardBackwardResult([np.array([-1.0, -2.0], np.float32)], {"loss:sum": 3.0})
    written = codec.to_json(codec.encode_forward_backward(trained), codec.FORWARD_BACKWARD_OUTPUT)
    assert ForwardBackwardResult.model_validate(written).loss_fn_outputs[0].root["logprobs"].data == [-1.0, -2.0]
    sequence = types.SampledSequence(np.array([7, 8], np.int32), np.array([-0.5, -1], np.float32), "length")
    sampled = codec.to_json(codec.encode_sample(types.SampleResult([sequence])), codec.SAMPLE_RESPONSE)
    assert SampleResult.model_validate(sampled).sequences[0].tokens == [7, 8]
