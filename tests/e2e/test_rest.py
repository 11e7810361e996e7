"""Sessions, training runs, samplers and checkpoints through the real SDK's RestClient: every method that reads or
changes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import tinker
from tinker.types import (
    ActiveSessionStatusQuery,
    ClientFinishedSessionStatusQuery,
    SessionSearchRequest,
    UserSearchOwner,
)

from tests.support.server import BASE_MODEL

pytestmark = pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental")


@pytest.fixture(scope="module")
def rest(server):
    return tinker.RestClient(base_url=server.url)


@pytest.fixture(scope="module")
def run(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A training run with two training checkpoints and one of a sampler."""
    training = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1, user_metadata={"why": "rest"}).result()
    training.save_state("a").result()
    training.save_weights_for_sampler("s", ttl_seconds=7200).result()
    training.save_state("b", user_metadata={"step": "0"}).result()
    return training


def path(run: tinker.TrainingClient, checkpoint_id: str) -> str:
    return f"tinker://{run.model_id}/{checkpoint_id}"


def session_of(run: tinker.TrainingClient) -> str:
    return run.model_id.partition(":")[0]


def test_training_runs(rest, run):
    found = rest.get_training_run(run.model_id, access_scope="accessible").result()
    assert (found.training_run_id, found.base_model, found.model_owner) == (run.model_id, BASE_MODEL, "local")
    assert (found.is_lora, found.lora_rank, found.corrupted, found.user_metadata) == (True, 4, False, {"why": "rest"})
    assert found.last_checkpoint.checkpoint_id == "weights/b"
    assert found.last_sampler_checkpoint.checkpoint_id == "sampler_weights/s"
    assert rest.get_training_run_by_tinker_path(path(run, "weights/a")).result() == found
    listed = rest.list_training_runs(limit=100).result()
    assert found in listed.training_runs
    assert listed.cursor.total_count == len(listed.training_runs)
    assert rest.list_training_runs(project_id="nobody's").result().training_runs == []
    with pytest.raises(tinker.NotFoundError):
        rest.get_training_run("nobody:train:0").result()


def test_checkpoints_are_listed(rest, run):
    of_run = rest.list_checkpoints(run.model_id).result().checkpoints
    assert [item.checkpoint_id for item in of_run] == ["weights/a", "sampler_weights/s", "weights/b"]
    assert [item.checkpoint_type for item in of_run] == ["training", "sampler", "training"]
    assert [item.tinker_path for item in of_run] == [path(run, item.checkpoint_id) for item in of_run]
    assert all(item.size_bytes > 0 for item in of_run)
    assert [item.user_metadata for item in of_run] == [None, None, {"step": "0"}]
    everything = rest.list_user_checkpoints(limit=1000).result()
    assert [item for item in everything.checkpoints if item in of_run] == of_run[::-1], "newest first"
    second = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert second.checkpoints == everything.checkpoints[1:2]
    assert second.cursor.total_count == len(everything.checkpoints)
    info = rest.get_weights_info_by_tinker_path(path(run, "weights/a")).result()
    assert (info.base_model, info.lora_rank, info.is_lora) == (BASE_MODEL, 4, True)


def test_publish_ttl_delete(rest, run):
    def state(name: str):
        return {item.checkpoint_id: item for item in rest.list_checkpoints(run.model_id).result().checkpoints}[name]

    for change, public in (("publish", True), ("publish", True), ("unpublish", False), ("unpublish", False)):
        getattr(rest, f"{change}_checkpoint_from_tinker_path")(path(run, "weights/a")).result()
        assert state("weights/a").public is public
    left = state("sampler_weights/s").expires_at - datetime.now(UTC)
    assert timedelta(hours=1) < left < timedelta(hours=2)
    rest.set_checkpoint_ttl_from_tinker_path(path(run, "weights/a"), 86400).result()
    left = state("weights/a").expires_at - datetime.now(UTC)
    assert timedelta(hours=23) < left < timedelta(hours=24)
    rest.set_checkpoint_ttl_from_tinker_path(path(run, "weights/a"), None).result()
    assert state("weights/a").expires_at is None
    for ttl_seconds in (3599, 10 * 365 * 86400 + 1):
        with pytest.raises(tinker.BadRequestError, match="ttl_seconds"):
            rest.set_checkpoint_ttl_from_tinker_path(path(run, "weights/a"), ttl_seconds).result()
    run.save_state("c").result()
    rest.delete_checkpoint(run.model_id, "weights/c").result()
    run.save_state("d").result()
    rest.delete_checkpoint_from_tinker_path(path(run, "weights/d")).result()
    with pytest.raises(KeyError):
        state("weights/c")
    for gone in (
        rest.delete_checkpoint(run.model_id, "weights/c"),
        rest.publish_checkpoint_from_tinker_path(path(run, "weights/d")),
        rest.set_checkpoint_ttl_from_tinker_path(path(run, "external_weights/x"), None),
    ):
        with pytest.raises(tinker.NotFoundError, match="checkpoint_id"):
            gone.result()
    run.save_state("c").result()  # the name is free again
    assert state("weights/c").size_bytes > 0


def test_sessions_and_samplers(rest, run, service):
    service.create_sampling_client(model_path=path(run, "sampler_weights/s")).result()
    session = session_of(run)
    assert session in rest.list_sessions(limit=1000, access_scope="accessible").result().sessions
    found = rest.get_session(session, access_scope="accessible").result()
    assert run.model_id in found.training_run_ids
    samplers = [rest.get_sampler(sampler_id).result() for sampler_id in found.sampler_ids]
    assert (path(run, "sampler_weights/s"), BASE_MODEL) in [(one.model_path, one.base_model) for one in samplers]
    with pytest.raises(tinker.NotFoundError):
        rest.get_session("nobody").result()
    with pytest.raises(tinker.NotFoundError):
        rest.get_sampler("nobody").result()


def test_a_session_is_placed_and_found(server, rest, run):
    session = session_of(run)
    rest.assign_session_project(session, "first").result()
    rest.assign_session_project(session, "first").result()
    rest.assign_session_project(session, "second").result()
    with pytest.raises(tinker.BadRequestError, match="project_id"):
        rest.assign_session_project(session, "").result()
    runs = rest.list_training_runs(project_id="second").result()
    assert run.model_id in [one.training_run_id for one in runs.training_runs]

    request = SessionSearchRequest(project_ids=["second"], statuses=[ActiveSessionStatusQuery()])
    (summary,) = rest.search_sessions(request).result().sessions
    assert (summary.session_id, summary.project_id, summary.status.type) == (session, "second", "active")
    living = rest.list_checkpoints(run.model_id).result().checkpoints
    assert summary.checkpoints_count == len(living)
    assert summary.checkpoint_storage_bytes == sum(item.size_bytes for item in living)
    nobody = UserSearchOwner(owner_urns=["urn:nobody"])
    assert rest.search_sessions(SessionSearchRequest(owner=nobody)).result().sessions == []


def test_ended_sessions_are_found_page_by_page(server, rest):
    for number, reason in enumerate(("success", "success", "errored", "success")):
        client = tinker.ServiceClient(
            base_url=server.url, display_name=f"Ending {number}", user_metadata={"n": str(number)}
        )
        client.create_sampling_client(base_model=BASE_MODEL).result()
        client.close(reason, detail=f"after {number}").result()
    finished = ClientFinishedSessionStatusQuery(reasons=["success"])
    request = SessionSearchRequest(display_name="ENDING", statuses=[finished], limit=2)
    page = rest.search_sessions(request).result()
    assert [one.user_metadata for one in page.sessions] == [{"n": "3"}, {"n": "1"}]
    assert [(one.status.reason.type, one.status.detail) for one in page.sessions] == [
        ("success", "after 3"),
        ("success", "after 1"),
    ]
    page = rest.search_sessions(request.model_copy(update={"cursor": page.next_cursor})).result()
    assert [one.display_name for one in page.sessions] == ["Ending 0"]
    assert page.next_cursor is None
