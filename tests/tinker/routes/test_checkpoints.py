"""Listing, deleting and expiring checkpoints over HTTP."""

from __future__ import annotations

import pytest

from tx.tinker.db import Checkpoint, now, writing


@pytest.fixture
def model(client, running):
    made = client.new_model()
    for seq, name in enumerate(("a", "b"), start=1):
        client.result(client.ask("save_weights", model_id=made, path=name, seq_id=seq, user_metadata={"k": name}))
    client.result(client.ask("save_weights_for_sampler", model_id=made, path="s", seq_id=3, ttl_seconds=3600))
    return made


def test_lists_page_and_name_what_the_sdk_reads(client, model):
    all_of_them = client.get("checkpoints").json()
    assert all_of_them["cursor"] == {"offset": 0, "limit": 20, "total_count": 3}
    assert [item["checkpoint_id"] for item in all_of_them["checkpoints"]] == [
        "sampler_weights/s",
        "weights/b",
        "weights/a",
    ]
    page = client.get("checkpoints?limit=1&offset=1").json()
    assert [item["checkpoint_id"] for item in page["checkpoints"]] == ["weights/b"]
    first, _, sampler = client.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]
    assert first["tinker_path"] == f"tinker://{model}/weights/a"
    assert (first["checkpoint_type"], sampler["checkpoint_type"]) == ("training", "sampler")
    assert first["time"].endswith("Z")
    assert "expires_at" not in first
    assert sampler["expires_at"] > sampler["time"]
    assert client.get(f"models/{model}/checkpoints").json()["checkpoints"][0] == first
    assert client.get("training_runs/nobody/checkpoints").status_code == 404


def test_delete_takes_row_and_files(client, model, config):
    folder = config.checkpoints_folder / model / "weights" / "a"
    folder.mkdir(parents=True)
    other = config.checkpoints_folder / model / "weights" / "b"
    other.mkdir()
    url = f"training_runs/{model}/checkpoints/weights/a"
    assert client.delete(url).status_code == 200
    assert not folder.exists()
    assert other.exists()
    assert client.get("checkpoints").json()["cursor"]["total_count"] == 2
    assert client.delete(url).status_code == 404


@pytest.mark.parametrize("checkpoint", ["weights/..", "weights/../../x", "nothing/a", "weights", "weights/a/b"])
def test_only_checkpoints_are_deleted(client, model, checkpoint, config):
    config.checkpoints_folder.mkdir()
    url = f"training_runs/{model}/checkpoints/{checkpoint.replace('..', '%2e%2e')}"
    assert client.delete(url).status_code == 404
    assert config.checkpoints_folder.exists()


def test_ttl_can_be_set_and_taken_back(client, model):
    url = f"training_runs/{model}/checkpoints/weights/a/ttl"
    assert client.put(url, json={"ttl_seconds": 86400}).status_code == 200
    listed = {item["checkpoint_id"]: item for item in client.get("checkpoints").json()["checkpoints"]}
    assert "expires_at" in listed["weights/a"]
    assert client.put(url, json={"ttl_seconds": None}).status_code == 200
    listed = {item["checkpoint_id"]: item for item in client.get("checkpoints").json()["checkpoints"]}
    assert "expires_at" not in listed["weights/a"]
    assert client.put(url, json={"ttl_seconds": 1}).status_code == 400
    assert client.put(url, json={}).status_code == 400


def test_an_expired_checkpoint_is_gone_and_then_swept(client, model, config):
    folder = config.checkpoints_folder / model / "weights" / "a"
    folder.mkdir(parents=True)
    with writing(client.service.db) as db:
        db.exec(Checkpoint.__table__.update().where(Checkpoint.name == "a").values(expires_at=now() - 1))
    assert client.get("checkpoints").json()["cursor"]["total_count"] == 2
    client.ask("weights_info", 404, tinker_path=f"tinker://{model}/weights/a")
    client.service.sweep()
    assert not folder.exists()
