"""Calls of RestClient and AdminClient."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import tinker
from tinker import types

from tests.compatibility.lab import LIMIT_S, PROJECT, Lab
from tests.compatibility.registry import call

TEN_MINUTES = timedelta(minutes=10)


def today() -> Any:
    return datetime.now(UTC).date()


def parts(path: str) -> tuple[str, str]:
    """Run id and checkpoint id of a tinker:// path."""
    _, _, run, kind, name = path.split("/")
    return run, f"{kind}/{name}"


@call("RestClient()")
@call("AdminClient()")
@call("RestClient()", "base_url", "api_key")
@call("AdminClient()", "base_url", "api_key")
def constructed(lab: Lab, do: Any) -> None:
    assert do(api_key="tml-test")


# ---- sessions ----


@call("RestClient.get_session")
def get_session(lab: Lab, do: Any) -> None:
    assert lab.run_id in do(lab.session_id).training_run_ids


@call("RestClient.get_session", "access_scope=owned")
def get_owned_session(lab: Lab, do: Any) -> None:
    assert do(lab.session_id, access_scope="owned").display_name == "Matrix lab"


@call("RestClient.get_session", "access_scope=accessible")
def get_accessible_session(lab: Lab, do: Any) -> None:
    assert do(lab.session_id, access_scope="accessible").display_name == "Matrix lab"


@call("RestClient.list_sessions")
def list_sessions(lab: Lab, do: Any) -> None:
    assert do().sessions


@call("RestClient.list_sessions", "limit", "offset")
def page_of_sessions(lab: Lab, do: Any) -> None:
    for _ in range(2):
        with tinker.ServiceClient(base_url=lab.url) as client:
            client.holder.get_session_id()
    first, second = (do(limit=1, offset=offset).sessions for offset in (0, 1))
    assert len(first) == len(second) == 1
    assert first != second


@call("RestClient.list_sessions", "access_scope=owned")
@call("RestClient.list_sessions", "access_scope=accessible")
def sessions_of_scopes(lab: Lab, do: Any) -> None:
    assert do(access_scope="owned").sessions
    assert do(access_scope="accessible").sessions


@call("RestClient.assign_session_project")
def assign_session_project(lab: Lab, do: Any) -> None:
    project = lab.name()
    with tinker.ServiceClient(base_url=lab.url) as client:
        session_id = client.holder.get_session_id()
        do(session_id, project)
    assert session_id in found(lab, project_ids=[project])


@call("RestClient.export_session_trace")
def export_session_trace(lab: Lab, do: Any) -> None:
    assert lab.training.get_info().model_id
    assert len(lab.download(do(lab.session_id))) > 100


# ---- search ----


def found(lab: Lab, **fields: Any) -> list[str]:
    page = lab.rest.search_sessions(types.SessionSearchRequest(**fields)).result(LIMIT_S)
    return [row.session_id for row in page.sessions]


@call("RestClient.search_sessions")
def search_sessions(lab: Lab, do: Any) -> None:
    row = next(row for row in do(types.SessionSearchRequest(session_id=lab.session_id)).sessions)
    assert (row.session_id, row.project_id, row.display_name) == (lab.session_id, PROJECT, "Matrix lab")


@call("SessionSearchRequest", "session_id")
def search_by_id(lab: Lab, do: Any) -> None:
    assert found(lab, session_id=lab.session_id) == [lab.session_id]


@call("SessionSearchRequest", "project_ids")
def search_by_project(lab: Lab, do: Any) -> None:
    assert lab.session_id in found(lab, project_ids=[PROJECT])
    assert lab.session_id not in found(lab, project_ids=["project-of-nobody"])


@call("SessionSearchRequest", "user_metadata")
def search_by_metadata(lab: Lab, do: Any) -> None:
    assert lab.session_id in found(lab, user_metadata={"made": "lab"})
    assert found(lab, user_metadata={"made": "lab", "more": "no"}) == []


@call("SessionSearchRequest", "display_name")
def search_by_name(lab: Lab, do: Any) -> None:
    assert lab.session_id in found(lab, display_name="lab MATRIX")


@call("SessionSearchRequest", "limit", "cursor")
def search_in_pages(lab: Lab, do: Any) -> None:
    name = lab.name()
    for _ in range(2):
        with tinker.ServiceClient(base_url=lab.url, display_name=name) as client:
            client.holder.get_session_id()
    first = lab.rest.search_sessions(types.SessionSearchRequest(display_name=name, limit=1)).result(LIMIT_S)
    request = types.SessionSearchRequest(display_name=name, limit=1, cursor=first.next_cursor)
    second = lab.rest.search_sessions(request).result(LIMIT_S)
    assert len({row.session_id for page in (first, second) for row in page.sessions}) == 2


@call("SessionSearchRequest", "owner=OwnSearchOwner")
def search_own(lab: Lab, do: Any) -> None:
    assert found(lab, session_id=lab.session_id, owner=types.OwnSearchOwner())


@call("SessionSearchRequest", "owner=AccessibleSearchOwner")
def search_accessible(lab: Lab, do: Any) -> None:
    assert found(lab, session_id=lab.session_id, owner=types.AccessibleSearchOwner())


@call("SessionSearchRequest", "owner=UserSearchOwner")
def search_of_user(lab: Lab, do: Any) -> None:
    request = types.SessionSearchRequest(session_id=lab.session_id)
    owner = lab.rest.search_sessions(request).result(LIMIT_S).sessions[0].owner
    assert found(lab, session_id=lab.session_id, owner=types.UserSearchOwner(owner_urns=[owner]))
    assert not found(lab, session_id=lab.session_id, owner=types.UserSearchOwner(owner_urns=["urn:of:nobody"]))


@call("SessionSearchRequest", "statuses=ActiveSessionStatusQuery")
def search_active(lab: Lab, do: Any) -> None:
    assert found(lab, session_id=lab.session_id, statuses=[types.ActiveSessionStatusQuery()])


@call("SessionSearchRequest", "statuses=ClientFinishedSessionStatusQuery")
def search_finished(lab: Lab, do: Any) -> None:
    with tinker.ServiceClient(base_url=lab.url) as client:
        session_id = client.holder.get_session_id()
    for reasons in (None, ["success"]):
        query = types.ClientFinishedSessionStatusQuery(reasons=reasons)
        assert found(lab, session_id=session_id, statuses=[query]) == [session_id]
    query = types.ClientFinishedSessionStatusQuery(reasons=["errored"])
    assert not found(lab, session_id=session_id, statuses=[query])


@call("SessionSearchRequest", "statuses=CancelledSessionStatusQuery")
def search_cancelled(lab: Lab, do: Any) -> None:
    assert not found(lab, session_id=lab.session_id, statuses=[types.CancelledSessionStatusQuery()])


@call("SessionSearchRequest", "statuses=FailedSessionStatusQuery")
def search_failed(lab: Lab, do: Any) -> None:
    assert not found(lab, session_id=lab.session_id, statuses=[types.FailedSessionStatusQuery()])


# ---- training runs ----


@call("RestClient.get_training_run")
@call("RestClient.get_training_run", "access_scope=owned")
def get_training_run(lab: Lab, do: Any) -> None:
    run = do(lab.run_id, access_scope="owned")
    assert (run.training_run_id, run.base_model, run.lora_rank) == (lab.run_id, lab.base_model, 4)


@call("RestClient.get_training_run", "access_scope=accessible")
def get_accessible_run(lab: Lab, do: Any) -> None:
    assert do(lab.run_id, access_scope="accessible").training_run_id == lab.run_id


@call("RestClient.get_training_run_by_tinker_path")
@call("RestClient.get_training_run_by_tinker_path", "access_scope=owned")
def run_of_path(lab: Lab, do: Any) -> None:
    assert do(lab.weights, access_scope="owned").training_run_id == lab.run_id


@call("RestClient.get_training_run_by_tinker_path", "access_scope=accessible")
def accessible_run_of_path(lab: Lab, do: Any) -> None:
    assert do(lab.weights, access_scope="accessible").training_run_id == lab.run_id


@call("RestClient.list_training_runs")
@call("RestClient.list_training_runs", "access_scope=owned")
def list_training_runs(lab: Lab, do: Any) -> None:
    assert do(access_scope="owned").training_runs


@call("RestClient.list_training_runs", "access_scope=accessible")
def accessible_runs(lab: Lab, do: Any) -> None:
    assert do(access_scope="accessible").training_runs


@call("RestClient.list_training_runs", "limit", "offset")
def page_of_runs(lab: Lab, do: Any) -> None:
    lab.new_training()
    first, second = (do(limit=1, offset=offset) for offset in (0, 1))
    assert first.training_runs[0].training_run_id != second.training_runs[0].training_run_id
    assert first.cursor.total_count >= 2


@call("RestClient.list_training_runs", "project_id")
def runs_of_project(lab: Lab, do: Any) -> None:
    assert lab.run_id in [run.training_run_id for run in do(limit=100, project_id=PROJECT).training_runs]
    assert do(project_id="project-of-nobody").training_runs == []


# ---- checkpoints ----


@call("RestClient.list_checkpoints")
def list_checkpoints(lab: Lab, do: Any) -> None:
    path = lab.weights
    assert path in [row.tinker_path for row in do(lab.run_id).checkpoints]


@call("RestClient.list_user_checkpoints")
def list_user_checkpoints(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    assert do().checkpoints[0].tinker_path == path  # newest first


@call("RestClient.list_user_checkpoints", "limit", "offset")
def page_of_checkpoints(lab: Lab, do: Any) -> None:
    older, newer = lab.new_weights(), lab.new_weights()
    assert [do(limit=1, offset=offset).checkpoints[0].tinker_path for offset in (0, 1)] == [newer, older]


@call("RestClient.get_weights_info_by_tinker_path")
def weights_info(lab: Lab, do: Any) -> None:
    info = do(lab.weights)
    assert (info.base_model, info.is_lora, info.lora_rank) == (lab.base_model, True, 4)


@call("RestClient.get_sampler")
def get_sampler(lab: Lab, do: Any) -> None:
    sampler = lab.service.create_sampling_client(model_path=lab.sampler_weights).result(LIMIT_S)
    described = do(sampler._sampling_session_id)
    assert (described.base_model, described.model_path) == (lab.base_model, lab.sampler_weights)


@call("RestClient.delete_checkpoint")
def delete_checkpoint(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    do(*parts(path))
    assert lab.checkpoint(path) is None


@call("RestClient.delete_checkpoint_from_tinker_path")
def delete_path(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    do(path)
    assert lab.checkpoint(path) is None


@call("RestClient.publish_checkpoint_from_tinker_path")
def publish(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    do(path)
    assert lab.checkpoint(path).public


@call("RestClient.unpublish_checkpoint_from_tinker_path")
def unpublish(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    lab.rest.publish_checkpoint_from_tinker_path(path).result(LIMIT_S)
    do(path)
    assert not lab.checkpoint(path).public


@call("RestClient.set_checkpoint_ttl_from_tinker_path")
def set_ttl(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    do(path, 7200)
    assert abs(lab.checkpoint(path).expires_at - datetime.now(UTC) - timedelta(hours=2)) < TEN_MINUTES
    do(path, None)
    assert lab.checkpoint(path).expires_at is None


@call("RestClient.copy_weights")
def copy_weights(lab: Lab, do: Any) -> None:
    assert lab.checkpoint(do(lab.weights, PROJECT)).checkpoint_type == "training"
    assert lab.checkpoint(do(lab.sampler_weights, PROJECT)).checkpoint_type == "sampler"


@call("RestClient.copy_weights", "destination_project_id", "ttl_seconds", "weights_access_token")
def copy_weights_with(lab: Lab, do: Any) -> None:
    copied = do(lab.weights, lab.name(), ttl_seconds=3600, weights_access_token="token")
    assert lab.checkpoint(copied).expires_at is not None


@call("RestClient.get_external_weights_urls")
def external_weights_urls(lab: Lab, do: Any) -> None:
    signed = do(lab.external_weights)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(signed.urls)
    assert signed.expires > datetime.now(UTC)
    assert all(lab.download(url) for url in signed.urls.values())


# ---- who I am, what it cost, what happened ----


@call("RestClient.whoami", refused="whoami requires JWT auth")
def whoami(lab: Lab, do: Any) -> None:
    identity = do()
    assert identity.user_urn
    assert identity.org_urn


@call("RestClient.get_billing_usage")
@call("AdminClient.get_billing_usage")
def billing_usage(lab: Lab, do: Any) -> None:
    assert lab.full_response
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = do(hour - timedelta(hours=1), hour + timedelta(hours=1))
    kinds = {event.event_info.type for event in usage.data if event.session_id == lab.session_id}
    assert {"training", "sampling_prefill", "sampling_sample"} <= kinds
    assert usage.sessions[lab.session_id].user_metadata == {"made": "lab"}


@call("RestClient.get_current_checkpoint_storage_usage")
@call("AdminClient.get_current_checkpoint_storage_usage")
def storage(lab: Lab, do: Any) -> None:
    assert lab.checkpoint(lab.weights).size_bytes > 0
    assert sum(row.size_bytes for row in do().data) > 0


@call("RestClient.get_current_checkpoint_storage_usage", "project_id")
@call("AdminClient.get_current_checkpoint_storage_usage", "project_id")
def storage_of_project(lab: Lab, do: Any) -> None:
    assert lab.weights
    assert {row.project_id for row in do(PROJECT).data} == {PROJECT}
    assert do("project-of-nobody").data == []


def events(entries: list[types.AuditLogEntry], path: str) -> list[str]:
    return [entry.event for entry in entries if path in (entry.tinker_path, *entry.event_details.values())]


@call("RestClient.get_audit_log")
@call("AdminClient.get_audit_log")
@call("RestClient.get_audit_log", "event_type=all", "day")
@call("AdminClient.get_audit_log", "event_type=all", "day")
def audit_log(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    lab.rest.delete_checkpoint_from_tinker_path(path).result(LIMIT_S)
    assert events(do("all", today()).entries, path)


@call("RestClient.get_audit_log", "event_type=checkpoints")
@call("AdminClient.get_audit_log", "event_type=checkpoints")
def audit_of_checkpoints(lab: Lab, do: Any) -> None:
    path = lab.new_weights()
    lab.rest.delete_checkpoint_from_tinker_path(path).result(LIMIT_S)
    assert events(do("checkpoints").entries, path)


def audit_without_checkpoints(event_type: str) -> Any:
    def run(lab: Lab, do: Any) -> None:
        path = lab.new_weights()
        lab.rest.delete_checkpoint_from_tinker_path(path).result(LIMIT_S)
        assert not events(do(event_type).entries, path)

    return run


for owner in ("RestClient", "AdminClient"):
    for kind in ("projects", "teams", "organizations"):
        call(f"{owner}.get_audit_log", f"event_type={kind}")(audit_without_checkpoints(kind))
