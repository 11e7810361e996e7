"""JSON training bodies of old SDKs: wrong shapes and types are refused by field name."""

import orjson
import pytest

from tx.errors import InvalidInput
from tx.tinker.wire import json_bodies


def body(datum=None, **inner) -> bytes:
    datum = datum or {
        "loss_fn_inputs": {"target_tokens": {"data": [2], "dtype": "int64"}},
        "model_input": {"chunks": [{"tokens": [1]}]},
    }
    inner = {"data": [datum], "loss_fn": "cross_entropy", **inner}
    return orjson.dumps({"forward_backward_input": inner, "model_id": "m", "seq_id": 3})


def test_a_good_body_reads():
    request = json_bodies.read_forward_backward(body(loss_fn_config={"beta": 0.5}))
    assert (request.model_id, request.seq_id, request.loss_config) == ("m", 3, {"beta": 0.5})
    assert request.data[0].inputs["target_tokens"].tolist() == [2]


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        (b"[1, 2]", "body"),
        (b'{"x": NaN}', "body"),
        (b"{}", "forward_backward_input"),
        (body(data=None), "data"),
        (body(data=[3]), r"data\[0\]"),
        (body(loss_fn=3), "loss_fn"),
        (body(loss_fn_config={"beta": True}), "loss_fn_config"),
        (body({"model_input": {"chunks": []}}), r"data\[0\]\.loss_fn_inputs"),
        (body({"loss_fn_inputs": {}}), r"data\[0\]\.model_input"),
        (body({"loss_fn_inputs": {}, "model_input": {"chunks": [3]}}), r"data\[0\]\.model_input\.chunks"),
        (
            body({"loss_fn_inputs": {"w": {"data": ["a"], "dtype": "float32"}}, "model_input": {"chunks": []}}),
            r"data\[0\]\.loss_fn_inputs\.w\.data",
        ),
        (
            body({"loss_fn_inputs": {"w": {"data": [[1]], "dtype": "int64"}}, "model_input": {"chunks": []}}),
            r"data\[0\]\.loss_fn_inputs\.w\.data",
        ),
        (
            body({"loss_fn_inputs": {"w": {"data": [1], "dtype": "int8"}}, "model_input": {"chunks": []}}),
            r"data\[0\]\.loss_fn_inputs\.w\.dtype",
        ),
    ],
)
def test_a_broken_body_is_refused_by_name(broken, field):
    with pytest.raises(InvalidInput, match=f"^{field}: "):
        json_bodies.read_forward_backward(broken)
