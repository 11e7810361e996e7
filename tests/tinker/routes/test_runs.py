"""Training runs over HTTP."""

from __future__ import annotations

import pytest
from tinker.types import TrainingRun, TrainingRunsResponse

from tx.tinker.db import Job, now, writing


def test_runs_list_models_newest_first_with_their_last_checkpoints(client, running):
    first, second = client.new_model(rank=4), client.new_model(rank=2)
    client.result(client.ask("save_weights", model_id=first, path="a", seq_id=1))
    client.result(client.ask("save_weights", model_id=first, path="b", seq_id=2))
    listed = client.get("training_runs").json()
    assert [run["training_run_id"] for run in listed["training_runs"]] == [second, first]
    assert listed["cursor"] == {"offset": 0, "limit": 20, "total_count": 2}
    run = client.get(f"training_runs/{first}").json()
    assert run == listed["training_runs"][1]
    assert (run["base_model"], run["lora_rank"], run["is_lora"]) == ("org/alias", 4, True)
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/b"
    assert "last_sampler_checkpoint" not in run
    assert run["last_request_time"] > listed["training_runs"][0]["last_request_time"], "of its last job"
    assert len(client.get("training_runs?limit=1").json()["training_runs"]) == 1
    assert client.get("training_runs/nobody").status_code == 404


def test_models_that_were_never_created_are_not_listed(client):
    session = client.new_session()
    client.ask("create_model", session_id=session, model_seq_id=0, base_model="nobody/nothing")
    assert client.get("training_runs").json()["training_runs"] == []


def test_runs_of_a_project_are_those_of_its_sessions(client, running):
    inside, outside = client.new_session(), client.new_session()
    first, second, other = client.new_model(inside), client.new_model(inside, 1), client.new_model(outside)
    client.put(f"sessions/{inside}/project", json={"project_id": "p"})

    def listed(**params) -> list[str]:
        page = TrainingRunsResponse.model_validate(client.get("training_runs", params=params).json())
        assert page.cursor.total_count >= len(page.training_runs)
        return [run.training_run_id for run in page.training_runs]

    assert listed() == listed(access_scope="accessible") == [other, second, first]
    assert listed(project_id="p") == listed(project_id="p", access_scope="owned") == [second, first]
    assert listed(project_id="p", limit=1, offset=1) == [first]
    assert listed(project_id="") == [other]
    assert listed(project_id="nobody") == []


@pytest.mark.parametrize("path", ["training_runs", "training_runs/{model}", "sessions", "sessions/{session}"])
def test_other_access_scopes_are_refused_by_name(client, running, path):
    session = client.new_session()
    url = path.format(model=client.new_model(session), session=session)
    assert client.get(url, params={"access_scope": "accessible"}).json() == client.get(url).json()
    refused = client.get(url, params={"access_scope": "everything"})
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("access_scope: got 'everything', accepted: ")


def test_metadata_is_told_as_strings(client, running):
    ask = {"session_id": client.new_session(), "model_seq_id": 0, "base_model": "org/base"}
    model = client.result(client.ask("create_model", **ask, user_metadata={"lr": "1e-4"}))["model_id"]
    run = TrainingRun.model_validate(client.get(f"training_runs/{model}").json())
    assert run.user_metadata == {"lr": "1e-4"}
    client.ask("create_model", 400, **ask | {"model_seq_id": 1}, user_metadata={"lr": 1e-4})


def test_a_run_is_corrupted_while_its_last_answer_is_the_servers_failure(client, running):
    model = client.new_model()

    def answered(status: str, **values) -> bool:
        given = {"base_model": "org/base", "created_at": now(), "finished_at": now()}
        with writing(client.service.db) as db:
            db.add(Job(kind="optim_step", model_id=model, status=status, **given | values))
        return TrainingRun.model_validate(client.get(f"training_runs/{model}").json()).corrupted

    assert not answered("failed", error="adam_params: no", category="user")
    assert answered("failed", error="lost", category="server")
    assert answered("failed", error="adam_params: no", category="user"), "a refusal says nothing of the model"
    assert answered("running", finished_at=None)
    assert client.get("training_runs").json()["training_runs"][0]["corrupted"]
    assert not answered("done")


def test_a_run_that_could_not_be_created_is_corrupted(client):
    session = client.new_session()
    client.ask("create_model", session_id=session, model_seq_id=0, base_model="nobody/nothing")
    assert client.get(f"training_runs/{session}:train:0").json()["corrupted"] is True
