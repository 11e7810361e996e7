"""Training runs over HTTP."""

from __future__ import annotations


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
