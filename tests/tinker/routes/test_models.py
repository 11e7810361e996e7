"""create_model, get_info, unload_model over HTTP."""

from __future__ import annotations

import json

from sqlmodel import select

from tx.tinker.db import Job, Model, reading


def jobs_of(client) -> list[Job]:
    with reading(client.service.db) as session:
        return list(session.exec(select(Job).order_by(Job.request_id)).all())


def test_a_model_is_created_and_described(client, running):
    session = client.new_session()
    model = client.new_model(session, rank=4, train_mlp=False)
    assert model == f"{session}:train:0", "clients derive this id themselves"
    info = client.ask("get_info", model_id=model)
    assert info["model_data"] == {"model_name": "org/alias", "tokenizer_id": "org/tokenizer"}
    assert (info["model_id"], info["lora_rank"], info["is_lora"]) == (model, 4, True)
    assert "optimizer_config" not in info, "null is invalid for the SDK"


def test_optimizer_config_is_told_back(client, running):
    session = client.new_session()
    future = client.ask(
        "create_model",
        session_id=session,
        model_seq_id=0,
        base_model="org/base",
        lora_config={"rank": 2},
        optimizer_config={"type": "adamw"},
    )
    assert client.ask("get_info", model_id=client.result(future)["model_id"])["optimizer_config"] == {"type": "adamw"}


def test_c12_every_field_reaches_the_job(client):
    session = client.new_session()
    lora = {"rank": 3, "seed": -5, "train_attn": False, "train_mlp": True, "train_unembed": False}
    client.ask(
        "create_model",
        session_id=session,
        model_seq_id=2,
        base_model="org/alias",
        lora_config=lora,
        user_metadata={"k": "v"},
        type="create_model",
    )
    (job,) = jobs_of(client)
    assert (job.kind, job.base_model, job.model_id, job.seq_id) == (
        "create_model",
        "org/base",
        f"{session}:train:2",
        0,
    )
    assert json.loads(job.payload)["lora_config"] == lora
    with reading(client.service.db) as db:
        model = db.get(Model, job.model_id)
    assert (model.rank, model.seed, model.train_attn, model.train_mlp, model.train_unembed) == (
        3,
        -5,
        False,
        True,
        False,
    )
    assert (model.served_name, model.state, model.user_metadata) == ("org/alias", "pending", {"k": "v"})


def test_an_unset_seed_is_drawn_once_and_stored(client):
    session = client.new_session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "org/base", "lora_config": {"rank": 3}}
    first = client.ask("create_model", **body)
    again = client.ask("create_model", **body)
    assert first == again
    (job,) = jobs_of(client)
    seed = json.loads(job.payload)["lora_config"]["seed"]
    with reading(client.service.db) as db:
        assert db.get(Model, job.model_id).seed == seed
    client.ask("create_model", **body | {"model_seq_id": 1})
    assert json.loads(jobs_of(client)[1].payload)["lora_config"]["seed"] != seed


def test_old_clients_send_nulls(client, running):
    future = client.ask(
        "create_model",
        session_id=client.new_session(),
        model_seq_id=0,
        base_model="org/base",
        user_metadata=None,
        lora_config={"rank": 8, "seed": None, "train_unembed": True, "train_mlp": True, "train_attn": True},
    )
    assert client.result(future)["model_id"]


def test_c12_unknown_base_models_and_optimizers_fail_the_future_by_name(client):
    session = client.new_session()
    body = {"session_id": session, "lora_config": {"rank": 3}}
    unknown = client.ask("create_model", model_seq_id=0, base_model="nobody/nothing", **body)
    failure = client.result(unknown)
    assert failure["category"] == "user"
    assert failure["request_id"] == unknown["request_id"]
    assert failure["error"].startswith("base_model: got 'nobody/nothing'")
    dimuon = {"type": "dimuon", "version": 1}
    refused = client.ask("create_model", model_seq_id=1, base_model="org/base", optimizer_config=dimuon, **body)
    assert "optimizer_config.type" in client.result(refused)["error"]
    for n in (0, 1):
        client.ask("get_info", status=404, model_id=f"{session}:train:{n}")


def test_unload_becomes_a_job(client, running):
    model = client.new_model()
    client.result(client.ask("unload_model", model_id=model))
    assert [job.kind for job in running.seen] == ["create_model", "unload_model"]
