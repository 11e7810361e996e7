"""Saving and loading over HTTP: names, paths, both addressings."""

from __future__ import annotations

import json

import pytest

from tx.tinker.db import Model, Sampler, reading


@pytest.fixture
def model(client, running):
    return client.new_model(rank=4, seed=9, train_mlp=False)


def save(client, model, name="ck1", seq=1, **extra):
    return client.result(client.ask("save_weights", model_id=model, path=name, seq_id=seq, **extra))


def test_save_and_weights_info(client, model):
    path = save(client, model, ttl_seconds=3600, overwrite=False, type="save_weights")["path"]
    assert path == f"tinker://{model}/weights/ck1"
    info = client.ask("weights_info", tinker_path=path)
    assert info == {
        "base_model": "org/alias",
        "is_lora": True,
        "lora_rank": 4,
        "train_unembed": True,
        "train_mlp": False,
        "train_attn": True,
    }


def test_an_unnamed_save_makes_the_sampler_at_once(client, model):
    future = client.ask(
        "save_weights_for_sampler", model_id=model, sampling_session_seq_id=3, kind="inflight", seq_id=1
    )
    session = model.split(":")[0]
    assert client.result(future)["sampling_session_id"] == f"{session}:sample:3"
    with reading(client.service.db) as db:
        sampler = db.get(Sampler, f"{session}:sample:3")
    assert (sampler.kind, sampler.base_model, sampler.seq) == ("inflight", "org/base", 3)


def test_create_via_load_takes_the_shape_from_the_checkpoint(client, model, running):
    path = save(client, model)["path"]
    session = model.split(":")[0]
    future = client.ask("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=False)
    assert client.result(future)["model_id"] == f"{session}:train:1"
    job = running.seen[-1]
    assert (job.kind, job.seq_id, job.model_id) == ("load_weights", 0, f"{session}:train:1")
    assert json.loads(job.payload)["path"] == path
    with reading(client.service.db) as db:
        made = db.get(Model, f"{session}:train:1")
    assert (made.rank, made.train_mlp, made.source_path, made.state) == (4, False, path, "ready")
    assert client.ask("get_info", model_id=made.model_id)["lora_rank"] == 4
    retried = client.ask("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=False)
    assert retried == future


def test_create_via_load_of_nothing_fails_the_future(client, model):
    session = model.split(":")[0]
    wrong = [
        (f"tinker://{model}/weights/none", None, "path"),
        ("tinker://../../etc/weights/x", None, "path"),
        (save(client, model)["path"], "org/other", "base_model"),
    ]
    for n, (path, base, field) in enumerate(wrong, start=1):
        future = client.ask("load_weights", session_id=session, model_seq_id=n, path=path, base_model=base)
        failure = client.result(future)
        assert failure["error"].split(":")[0] == field
        client.ask("get_info", status=404, model_id=f"{session}:train:{n}")


def test_load_into_an_existing_model_is_one_of_its_jobs(client, model, running):
    path = save(client, model)["path"]
    client.result(client.ask("load_weights", model_id=model, seq_id=2, path=path, optimizer=True))
    job = running.seen[-1]
    assert (job.kind, job.model_id, job.seq_id) == ("load_weights", model, 2)
    assert json.loads(job.payload)["optimizer"] is True


def test_a_version_that_cannot_name_the_optimizer_gets_it(client, model, running):
    body = {"model_id": model, "seq_id": 2, "path": save(client, model)["path"]}
    old = {"user-agent": "AsyncTinker/Python 0.3.0", "x-stainless-package-version": "0.3.0"}
    client.result(client.post("load_weights", json=body, headers=old).json())
    assert json.loads(running.seen[-1].payload)["optimizer"] is True


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "x" * 129, "a b", "a\0b", "é"])
def test_names_cannot_leave_their_folder(client, model, name):
    for path in ("save_weights", "save_weights_for_sampler"):
        assert client.ask(path, status=400, model_id=model, path=name, seq_id=1)["detail"].startswith("path: got")


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"ttl_seconds": 3599}, "ttl_seconds"),
        ({"ttl_seconds": 315360001}, "ttl_seconds"),
        ({"ttl_seconds": "3600"}, "ttl_seconds"),
        ({"seq_id": 1.5}, "seq_id"),
        ({"seq_id": -1}, "seq_id"),
        ({"seq_id": 2**63}, "seq_id"),
        ({"overwrite": "yes"}, "overwrite"),
        ({"user_metadata": {"a": 1}}, "user_metadata.a"),
        ({"type": "save_wates"}, "type"),
        ({"ttl": 3600}, "ttl"),
    ],
)
def test_malformed_saves_are_400_and_name_the_field(client, model, extra, names):
    body = {"model_id": model, "path": "x", "seq_id": 1} | extra
    assert client.ask("save_weights", status=400, **body)["detail"].split(":")[0] == names


@pytest.mark.parametrize("extra", [{}, {"path": "x", "sampling_session_seq_id": 1}])
def test_a_sampler_save_is_named_or_unnamed(client, model, extra):
    detail = client.ask("save_weights_for_sampler", status=400, model_id=model, seq_id=1, **extra)["detail"]
    assert "path or sampling_session_seq_id" in detail


def test_load_addressing_is_one_of_two(client, model):
    client.ask("load_weights", status=400, path="tinker://x")
    client.ask("load_weights", status=400, path="tinker://x", model_id=model, session_id="s", model_seq_id=1)


def test_weights_info_of_nothing_is_404(client, model):
    client.ask("weights_info", status=404, tinker_path=f"tinker://{model}/weights/none")
    client.ask("weights_info", status=400, tinker_path="/etc/passwd")


def test_an_external_save_is_a_job_of_its_model(client, model, running):
    body = {"model_id": model, "path": "x", "seq_id": 1, "ttl_seconds": 3600, "age_encryption_recipients": ["age1x"]}
    client.result(client.ask("save_weights_external", **body, type="save_weights_external"))
    job = running.seen[-1]
    assert (job.kind, job.model_id, job.seq_id) == ("save_weights_external", model, 1)
    assert json.loads(job.payload) == body | {"type": "save_weights_external"}


def copied(client, path, status=200, key=None, **body):
    headers = {"X-Tinker-Weights-Access-Token": "t"} | ({"X-Idempotency-Key": key} if key else {})
    reply = client.post("copy_weights", json={"source_path": path} | body, headers=headers)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_a_copy_is_made_once_per_key_and_read_like_its_source(client, model):
    path = save(client, model)["path"]
    first = copied(client, path, key="one", destination_project_id="p", ttl_seconds=3600)["tinker_path"]
    assert copied(client, path, key="one", destination_project_id="p", ttl_seconds=3600)["tinker_path"] == first
    assert copied(client, path, key="two", destination_project_id="p")["tinker_path"] != first
    infos = [client.ask("weights_info", tinker_path=each, weights_access_token="t") for each in (path, first)]
    assert infos[0] == infos[1]
    run = first.split("/")[2]
    assert client.get(f"training_runs/{run}").json()["training_run_id"] == run
    assert client.ask("optim_step", 400, model_id=run, seq_id=1, adam_params={})["detail"].startswith("model_id: got")


def test_a_copy_in_a_session_takes_a_model_number(client, model):
    path, session = save(client, model)["path"], model.split(":")[0]
    assert copied(client, path, session_id=session, model_seq_id=5)["tinker_path"] == (
        f"tinker://{session}:train:5/weights/ck1"
    )
    assert copied(client, path, 400, session_id=session, model_seq_id=0)["detail"].startswith("model_seq_id: got")
    config = {"session_id": session, "model_seq_id": 5, "base_model": "org/alias"}
    assert client.ask("create_model", 400, **config)["detail"].startswith("model_seq_id: got")


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"session_id": "s"}, "model_seq_id"),
        ({"model_seq_id": 1}, "session_id"),
        ({"session_id": "s", "model_seq_id": 1, "destination_project_id": "p"}, "destination_project_id"),
        ({"ttl_seconds": 60}, "ttl_seconds"),
        ({"source_path": "tinker://m/weights/x"}, "source_path"),
        ({"source_path": "/etc/passwd"}, "source_path"),
    ],
)
def test_malformed_copies_are_400_and_name_the_field(client, model, body, names):
    path = save(client, model)["path"]
    assert names in copied(client, path, 400, **body)["detail"]


def test_external_weights_are_neither_loaded_nor_sampled(client, model):
    path, session = f"tinker://{model}/external_weights/x", model.split(":")[0]
    failure = client.result(client.ask("load_weights", session_id=session, model_seq_id=1, path=path))
    assert failure["error"].startswith("path: got")
    refusal = client.ask("create_sampling_session", 400, session_id=session, sampling_session_seq_id=0, model_path=path)
    assert refusal["detail"].startswith("model_path: got")
    assert client.ask("weights_info", 404, tinker_path=path)["detail"].startswith("tinker_path: got")
