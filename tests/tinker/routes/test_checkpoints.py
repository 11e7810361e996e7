"""Listing, publishing, deleting and expiring checkpoints over HTTP."""

from __future__ import annotations

import pytest
from sqlmodel import select
from tinker.types import CheckpointsListResponse

from tests.tinker.conftest import Client
from tx.tinker.db import Checkpoint, now, open_database, writing
from tx.tinker.service import Service


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
    refused = client.delete(url)
    assert (refused.status_code, refused.json()["detail"].split(":")[0]) == (400, "checkpoint_id")
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


@pytest.mark.parametrize("ttl_seconds", [3599, 315_360_001, 0, -1, "3600", 3600.5, True])
def test_ttls_out_of_range_are_refused_and_change_nothing(client, model, ttl_seconds):
    url = f"training_runs/{model}/checkpoints/weights/a/ttl"
    refused = client.put(url, json={"ttl_seconds": ttl_seconds})
    assert (refused.status_code, refused.json()["detail"].split(":")[0]) == (400, "ttl_seconds")
    assert "expires_at" not in client.get(f"training_runs/{model}/checkpoints").json()["checkpoints"][0]


def test_publishing_is_kept_and_repeats_are_fine(client, model):
    url = f"training_runs/{model}/checkpoints/weights/a/publish"

    def published() -> list[str]:
        listed = client.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]
        return [item["checkpoint_id"] for item in listed if item["public"]]

    for _ in range(2):
        assert client.post(url).status_code == 200
        assert published() == ["weights/a"]
    for _ in range(2):
        assert client.delete(url).status_code == 200
        assert published() == []
    assert client.post(f"training_runs/{model}/checkpoints/weights/none/publish").status_code == 404
    assert client.delete("training_runs/nobody/checkpoints/weights/a/publish").status_code == 404
    assert len(client.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]) == 3, "nothing was deleted"


def test_an_external_checkpoint_is_listed_only_to_clients_that_can_read_it(client, model):
    with writing(client.service.db) as db:
        db.add(
            Checkpoint(model_id=model, kind="external_weights", name="x", folder="x", size_bytes=1, created_at=now())
        )
    for version, reads in (("0.26.0", False), ("0.28.0", True), ("0.38.0", True), (None, True)):
        headers = {"x-stainless-package-version": version} if version else {}
        for path in ("checkpoints", f"training_runs/{model}/checkpoints"):
            listing = client.get(path, headers=headers).json()
            types = {item["checkpoint_id"]: item["checkpoint_type"] for item in listing["checkpoints"]}
            assert types.get("external_weights/x") == ("external" if reads else None)
            assert listing.get("cursor", {}).get("total_count", len(types)) == len(types) == 3 + reads
            CheckpointsListResponse.model_validate(listing)
    url = f"training_runs/{model}/checkpoints/external_weights/x"
    assert client.put(f"{url}/ttl", json={"ttl_seconds": 86400}).status_code == 200
    assert client.delete(url).status_code == 200


def test_a_copy_keeps_the_files_that_it_shares(client, model, config):
    folder = config.checkpoints_folder / model / "weights" / "a"
    folder.mkdir(parents=True)
    with writing(client.service.db) as db:
        source = db.exec(select(Checkpoint).where(Checkpoint.name == "a")).one()
        copy = {"model_id": model, "kind": "weights", "name": "copy", "size_bytes": 10, "created_at": now()}
        db.add(Checkpoint(folder=source.folder, **copy))
    assert client.delete(f"training_runs/{model}/checkpoints/weights/a").status_code == 200
    assert folder.exists()
    assert client.delete(f"training_runs/{model}/checkpoints/weights/copy").status_code == 200
    assert not folder.exists()


def test_an_expired_checkpoint_is_gone_and_then_swept(config, running):
    clock = [now()]
    service = Service(config, open_database(config.resolved_database_url), clock=lambda: clock[0])
    with Client(service) as client:
        model = client.new_model()
        for seq, name in enumerate(("a", "b"), start=1):
            client.result(client.ask("save_weights", model_id=model, path=name, seq_id=seq))
            (config.checkpoints_folder / model / "weights" / name).mkdir(parents=True)
        url = f"training_runs/{model}/checkpoints/weights/a/ttl"
        assert client.put(url, json={"ttl_seconds": 3600}).status_code == 200
        clock[0] += 3599
        service.sweep()
        assert client.get("checkpoints").json()["cursor"]["total_count"] == 2
        clock[0] += 2
        assert client.get("checkpoints").json()["cursor"]["total_count"] == 1
        assert client.get(f"training_runs/{model}").json()["last_checkpoint"]["checkpoint_id"] == "weights/b"
        client.ask("weights_info", 404, tinker_path=f"tinker://{model}/weights/a")
        assert client.put(url, json={"ttl_seconds": None}).status_code == 404
        service.sweep()
        assert [folder.name for folder in (config.checkpoints_folder / model / "weights").iterdir()] == ["b"]
    service.close()
