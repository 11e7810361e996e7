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
    assert client.result(future) == {"sampling_session_id": f"{session}:sample:3"}
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
