"""forward, forward_backward, optim_step over HTTP."""

from __future__ import annotations

import pytest
import zstandard
from sqlmodel import select

from tx.tinker.db import Job, reading
from tx.tinker.wire import tinker_pb2 as pb

PROTO = {"content-type": "application/x-protobuf"}
JSON_INPUT = {
    "data": [
        {
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                "weights": {"data": [0.0, 1.0], "dtype": "float32", "shape": [2]},
            },
            "model_input": {"chunks": [{"tokens": [1, 2]}]},
        }
    ],
    "loss_fn": "cross_entropy",
    "loss_fn_config": None,
}


def body(model: str, seq: int, forward_only: bool = False, num_tokens: int = 2) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy", forward_only=forward_only)
    message.data.add().model_input.add().encoded_text.tokens = b"\1\0\0\0" * num_tokens
    return message.SerializeToString()


def last_job(client) -> Job:
    with reading(client.service.db) as db:
        return db.exec(select(Job).order_by(Job.request_id.desc())).first()


@pytest.fixture
def model(client, running):
    return client.new_model()


def test_protobuf_bodies_are_stored_as_they_came(client, model):
    for seq, encoding in ((1, None), (2, "zstd")):
        content = body(model, seq)
        sent = zstandard.compress(content) if encoding else content
        headers = PROTO | ({"content-encoding": encoding} if encoding else {})
        reply = client.post("forward_backward", content=sent, headers=headers)
        assert reply.status_code == 200
        job = last_job(client)
        assert reply.json() == {"request_id": str(job.request_id), "model_id": model}
        assert (job.kind, job.model_id, job.seq_id, job.tokens_in) == ("forward_backward", model, seq, 2)
        assert (job.payload, job.payload_type, job.payload_encoding) == (sent, "application/x-protobuf", encoding)


def test_results_are_protobuf_where_accepted_and_json_elsewhere(client, model):
    future = client.post("forward_backward", content=body(model, 1), headers=PROTO).json()
    ask = {"request_id": future["request_id"], "allow_metadata_only": True}
    reply = client.post("retrieve_future", json=ask, headers={"accept": "application/x-protobuf"})
    assert reply.headers["content-type"] == "application/x-protobuf"
    assert pb.ForwardBackwardOutput.FromString(reply.content).metrics["loss:sum"] == 3.0
    old = client.result(future, accept="application/json")
    assert old["metrics"] == {"loss:sum": 3.0}
    assert old["loss_fn_outputs"][0]["logprobs"]["data"] == [-1.0, -2.0]


def test_forward_is_its_own_kind(client, model):
    client.post("forward_backward", content=body(model, 1, forward_only=True), headers=PROTO)
    assert last_job(client).kind == "forward"


@pytest.mark.parametrize(
    ("path", "key", "kind"),
    [("forward_backward", "forward_backward_input", "forward_backward"), ("forward", "forward_input", "forward")],
)
def test_json_bodies_of_old_sdks(client, model, path, key, kind):
    future = client.ask(path, **{key: JSON_INPUT, "model_id": model, "seq_id": 1})
    job = last_job(client)
    assert (job.kind, job.seq_id, job.tokens_in, job.payload_type) == (kind, 1, 2, "application/json")
    assert client.result(future)["metrics"] == {"loss:sum": 3.0}


def test_c11_a_retry_gets_the_same_request_and_runs_once(client, model, running):
    first, other = (client.post("forward_backward", content=body(model, 1), headers=PROTO).json() for _ in range(2))
    assert first == other
    client.result(client.ask("optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 1e-4}))
    assert [job.kind for job in running.seen] == ["create_model", "forward_backward", "optim_step"]


def test_chunks_may_come_last_first(client, model):
    """The SDK sends chunk 1 only after all others were acknowledged: nothing may wait for its turn."""
    for seq in (2, 3, 1):
        assert client.post("forward_backward", content=body(model, seq), headers=PROTO).status_code == 200


def test_a_reused_seq_is_refused_by_name_and_never_with_409(client, model):
    client.post("forward_backward", content=body(model, 1), headers=PROTO)
    longer = client.post("forward_backward", content=body(model, 1, num_tokens=5), headers=PROTO)
    assert (longer.status_code, longer.json()["detail"].split(":")[0]) == (400, "seq_id")
    detail = client.ask("optim_step", status=400, model_id=model, seq_id=1, adam_params={})["detail"]
    assert detail.startswith("seq_id: got 1")


@pytest.mark.parametrize(
    ("content", "headers", "names"),
    [
        (b"\xff\xff garbage", PROTO, "body"),
        (b"", PROTO, "model_id"),
        (b"(\xb5/\xfd truncated", PROTO | {"content-encoding": "zstd"}, "body"),
        (b"x", PROTO | {"content-encoding": "br"}, "Content-Encoding"),
        (b"x", {"content-type": "text/plain"}, "Content-Type"),
        (b"{nonsense", {"content-type": "application/json"}, "body"),
    ],
)
def test_malformed_bodies_are_400_and_name_the_field(client, model, content, headers, names):
    reply = client.post("forward_backward", content=content, headers=headers)
    assert (reply.status_code, reply.json()["detail"].split(":")[0]) == (400, names)


def test_unknown_models_are_404(client):
    reply = client.post("forward_backward", content=body("sess-x:train:0", 1), headers=PROTO)
    assert reply.status_code == 404
    assert reply.json()["detail"].startswith("model_id")
    client.ask("optim_step", status=404, model_id="nobody", seq_id=1, adam_params={})


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"learning_rate": -1.0}, "adam_params.learning_rate"),
        ({"learning_rate": "1"}, "adam_params.learning_rate"),
        ({"beta1": 1.0}, "adam_params.beta1"),
        ({"momentum": 0.5}, "adam_params.momentum"),
        (None, "body"),
        ([], "adam_params"),
    ],
)
def test_c12_adam_params_are_honoured_or_refused_by_name(client, model, params, names):
    reply = client.ask("optim_step", status=400, model_id=model, seq_id=1, adam_params=params)
    assert reply["detail"].split(":")[0] == names


def test_nan_is_refused(client, model):
    content = f'{{"model_id": "{model}", "seq_id": 1, "adam_params": {{"learning_rate": NaN}}}}'
    reply = client.post("optim_step", content=content)
    assert reply.status_code == 400
    assert "learning_rate" in reply.json()["detail"]


def test_other_optimizers_fail_the_future_by_name(client, model):
    params = {"type": "dimuon", "learning_rate": 0.01}
    failure = client.result(client.ask("optim_step", model_id=model, seq_id=1, optimizer_params=params))
    assert failure["error"].startswith("optimizer_params.type")
    assert failure["category"] == "user"


def test_custom_losses_on_the_server_are_refused_by_name(client):
    reply = client.ask("create_custom_loss", 400, session_id="s", name="my_loss", inputs=[], graph={"nodes": []})
    assert reply["detail"].startswith("name: got 'my_loss'")
    assert "on the client" in reply["detail"]
