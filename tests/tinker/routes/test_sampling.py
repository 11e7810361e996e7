"""Sampling sessions and asample over HTTP."""

from __future__ import annotations

import json

import pytest
from sqlmodel import select

from tests.tinker.conftest import Client
from tx.tinker.config import TxConfig
from tx.tinker.db import Job, open_database, reading
from tx.tinker.service import Service
from tx.tinker.wire import tinker_pb2 as pb

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}


@pytest.fixture
def session(client):
    return client.new_session()


@pytest.fixture
def sampler(client, session):
    ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "org/alias"}
    return client.ask("create_sampling_session", **ask)["sampling_session_id"]


def sample(client, sampler, seq=0, status=200, **extra):
    return client.ask("asample", status, **{"sampling_session_id": sampler, "seq_id": seq, "prompt": PROMPT} | extra)


def payloads(client) -> list[dict]:
    with reading(client.service.db) as db:
        return [json.loads(job.payload) for job in db.exec(select(Job).order_by(Job.request_id)).all()]


def test_a_sampler_of_the_base_model(client, session, sampler):
    assert sampler == f"{session}:sample:0"
    assert client.get(f"samplers/{sampler}").json() == {"sampler_id": sampler, "base_model": "org/alias"}
    assert client.get("samplers/nobody").status_code == 404


def test_a_sampler_of_a_checkpoint(client, running):
    model = client.new_model()
    session = model.split(":")[0]
    save = client.ask("save_weights_for_sampler", model_id=model, path="s1", seq_id=1)
    path = client.result(save)["path"]
    ask = {"session_id": session, "sampling_session_seq_id": 1, "model_path": path}
    made = client.ask("create_sampling_session", **ask)
    assert client.ask("create_sampling_session", **ask) == made, "a retry"
    got = client.get(f"samplers/{made['sampling_session_id']}").json()
    assert (got["base_model"], got["model_path"]) == ("org/alias", path)
    taken = client.ask("create_sampling_session", 400, **ask | {"model_path": None, "base_model": "org/base"})
    assert taken["detail"].startswith("sampling_session_seq_id")


@pytest.mark.parametrize(
    ("what", "status", "names"),
    [
        ({"base_model": "nobody/nothing"}, 400, "base_model"),
        ({"model_path": "tinker://s:train:0/sampler_weights/none"}, 404, "model_path"),
        ({"model_path": "tinker://../../x"}, 400, "model_path"),
        ({"model_path": 7}, 400, "model_path"),
        ({}, 400, "body"),
        ({"base_model": "org/base", "session_id": "nobody"}, 404, "session_id"),
        ({"base_model": "org/base", "sampling_session_seq_id": "0"}, 400, "sampling_session_seq_id"),
    ],
)
def test_samplers_of_nothing(client, session, what, status, names):
    ask = {"session_id": session, "sampling_session_seq_id": 5} | what
    assert client.ask("create_sampling_session", status, **ask)["detail"].split(":")[0] == names


def test_the_reply_names_the_sequences_to_come(client, sampler, running):
    future = sample(client, sampler, num_samples=3)
    request_id = future["request_id"]
    assert future == {"request_id": request_id, "sample_sequence_ids": [f"{request_id}-{j}" for j in range(3)]}
    reply = client.post(
        "retrieve_future", json={"request_id": request_id}, headers={"accept": "application/x-protobuf"}
    )
    assert pb.SampleResponse.FromString(reply.content).sequences[0].tokens == b"\7\0\0\0\10\0\0\0"
    assert client.result(future)["sequences"][0] == {
        "stop_reason": "length",
        "tokens": [7, 8],
        "logprobs": [-0.5, -1.0],
    }


def test_c11_a_retried_sample_is_the_same_request_with_the_same_names(client, sampler):
    first = sample(client, sampler, seq=827701264000000000, num_samples=2)
    assert sample(client, sampler, seq=827701264000000000, num_samples=2) == first
    assert sample(client, sampler, seq=1, num_samples=2) != first
    assert len(payloads(client)) == 2
    assert sample(client, sampler, seq=1, num_samples=3, status=400)["detail"].startswith("seq_id")


def test_an_unset_seed_is_drawn_once_and_stored(client, sampler):
    sample(client, sampler, 0)
    sample(client, sampler, 0)
    sample(client, sampler, 1, sampling_params={"max_tokens": 4})
    sample(client, sampler, 2, sampling_params={"seed": -1})
    seeds = [payload["sampling_params"]["seed"] for payload in payloads(client)]
    assert len(seeds) == 3
    assert seeds[0] != seeds[1]
    assert seeds[2] == -1


def test_c12_every_field_reaches_the_job(client, sampler):
    params = {
        "max_tokens": 5,
        "seed": 1,
        "stop": ["\n\n"],
        "temperature": 0.7,
        "top_k": -1,
        "top_p": 1.0,
    }
    body = {
        "num_samples": 2,
        "prompt": PROMPT,
        "sampling_params": params,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": True,
        "type": "sample",
    }
    sample(client, sampler, 4, **body)
    assert payloads(client)[0] == body | {"sampling_session_id": sampler, "seq_id": 4}


def test_an_empty_stop_list_is_not_an_absent_one(client, sampler):
    sample(client, sampler, 0, sampling_params={"stop": []})
    sample(client, sampler, 1, sampling_params={"stop": None})
    sample(client, sampler, 2, sampling_params={"stop": [5, 6]})
    stops = [payload["sampling_params"].get("stop", "absent") for payload in payloads(client)]
    assert stops == [[], "absent", [5, 6]]


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"chunks": "abc"}}, "prompt.chunks"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"num_samples": "2"}, "num_samples"),
        ({"seq_id": "0"}, "seq_id"),
        ({"sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"sampling_params": {"seed": 2**63}}, "sampling_params.seed"),
        ({"sampling_params": {"min_p": 0.1}}, "sampling_params.min_p"),
        ({"sampling_params": {"max_tokens": 1.5}}, "sampling_params.max_tokens"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
    ],
)
def test_malformed_samples_are_400_and_name_the_field(client, sampler, extra, names):
    assert sample(client, sampler, status=400, **extra)["detail"].split(":")[0] == names


def test_unknown_samplers_are_404(client):
    assert sample(client, "nobody", status=404)["detail"].startswith("sampling_session_id")


def test_a_failure_travels_through_the_future(client, sampler, running):
    future = sample(client, sampler, sampling_params={"stop": "fail me"})
    failure = client.result(future, accept="application/x-protobuf")
    assert failure == {"error": "sampling_params.stop: no", "category": "user", "request_id": future["request_id"]}


@pytest.fixture
def narrow(tmp_path, engine):
    """A server that takes four sequences."""
    config = TxConfig(
        base_model="org/base", data_dir=tmp_path, database_url=f"sqlite:///{tmp_path / 'tx.db'}", max_queued_samples=4
    )
    service = Service(config, open_database(config.resolved_database_url))
    with Client(service) as client:
        yield client
    service.close()


def test_a_full_queue_is_429_and_the_same_request_succeeds_later(narrow):
    sampler = narrow.new_sampler()
    first = narrow.sample(sampler, 0, num_samples=3)
    body = {"sampling_session_id": sampler, "seq_id": 1, "num_samples": 2, "prompt": PROMPT}
    for _ in range(2):
        refused = narrow.post("asample", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "--max-queued-samples" in refused.json()["detail"]
    assert len(payloads(narrow)) == 1, "nothing of it was stored"
    assert narrow.sample(sampler, 2)["sample_sequence_ids"], "what fits is taken"
    assert narrow.sample(sampler, 0, num_samples=3) == first, "a retry gets its id however full the queue is"
    narrow.ask("cancel_future", request_id=first["request_id"])
    assert narrow.post("asample", json=body).status_code == 200
    assert narrow.sample(sampler, 3, status=400, num_samples=5)["detail"].startswith("num_samples")


def test_training_is_taken_while_the_queue_is_full(narrow):
    session = narrow.new_session()
    narrow.sample(narrow.new_sampler(session), num_samples=4)
    future = narrow.ask("create_model", session_id=session, model_seq_id=0, base_model="org/base")
    assert future["request_id"]


def test_every_copy_of_a_client_gets_its_own_number(client):
    sampler = client.new_sampler()
    joined = [client.ask("join_sampling_session", sampling_session_id=sampler) for _ in range(3)]
    assert [reply["client_counter"] for reply in joined] == [1, 2, 3]
    assert {reply["type"] for reply in joined} == {"join_sampling_session"}
    client.ask("join_sampling_session", 404, sampling_session_id="s:sample:9")
    client.ask("join_sampling_session", 400)
