"""Searching sessions: every filter, paging, and what became of each; on both databases."""

from __future__ import annotations

import itertools

import pytest
from tinker.types import SessionSearchRequest, SessionSearchResponse

from tests.tinker.test_sessions import model_row
from tx.tinker.db import Checkpoint, Job, Session, writing
from tx.tinker.session_search import search
from tx.tinker.wire.requests import SearchSessions, parse

NOW = 10_000.0
FRESH, SILENT = NOW - 10.0, NOW - 500.0


@pytest.fixture
def add(db):
    created = itertools.count(1)

    def add(session_id: str, *rows, heartbeat_at: float = FRESH, **values) -> None:
        given = {"created_at": float(next(created)), "heartbeat_at": heartbeat_at} | values
        with writing(db) as session:
            for row in (Session(session_id=session_id, **given), *rows):
                session.add(row)

    return add


def job(session_id: str, status: str = "failed", kind: str = "forward_backward", **values) -> Job:
    finished_at = None if status in ("pending", "running") else 5.0
    given = {"base_model": "m", "created_at": 1.0, "finished_at": finished_at}
    if status == "failed":
        given |= {"error": "weights: no", "category": "user"}
    return Job(session_id=session_id, kind=kind, status=status, **given | values)


def ask(db, silent_before: float = NOW - 120.0, **request) -> SessionSearchResponse:
    """Through the SDK's own types, there and back."""
    body = SessionSearchRequest(**request).model_dump_json(exclude_none=True).encode()
    reply = search(db, parse(SearchSessions, body), at=NOW, active_since=NOW - 120.0, silent_before=silent_before)
    return SessionSearchResponse.model_validate(reply.model_dump(mode="json", exclude_none=True))


def found(db, **request) -> list[str]:
    return [session.session_id for session in ask(db, **request).sessions]


def test_a_summary_says_what_is_known(db, add):
    add("bare")
    add("full", model_row("full", 0), display_name="Nightly", project_id="p", user_metadata={"a": "b"}, created_at=60.5)
    with writing(db) as session:
        for name, folder, expires_at in (("a", "x", None), ("b", "x", NOW + 1), ("c", "y", None), ("d", "z", NOW)):
            session.add(
                Checkpoint(
                    model_id="full:train:0",
                    kind="weights",
                    name=name,
                    folder=folder,
                    size_bytes=100,
                    created_at=1.0,
                    expires_at=expires_at,
                )
            )
    full, bare = ask(db).sessions
    assert (full.session_id, full.owner, full.project_id, full.display_name) == ("full", "local", "p", "Nightly")
    assert (full.created_at.timestamp(), full.user_metadata) == (60.5, {"a": "b"})
    assert full.checkpoints_count == 3, "the expired one is none"
    assert full.checkpoint_storage_bytes == 200, "copies share their files"
    assert (bare.project_id, bare.display_name, bare.user_metadata, bare.checkpoints_count) == ("", None, None, 0)


def test_names_are_found_by_any_part_of_any_word_in_any_case(db, add):
    for session_id, name in (("a", "Nightly RUN of qwen"), ("b", "nightly"), ("c", "ÄRGER im Büro"), ("d", None)):
        add(session_id, display_name=name)
    assert found(db, display_name="night") == ["b", "a"]
    assert found(db, display_name="run NIGHT") == ["a"]
    assert found(db, display_name="ärger BÜRO") == ["c"]
    assert found(db, display_name="100%") == []
    assert found(db, display_name="_") == []


def test_an_id_alone_must_match_and_with_a_name_either_may(db, add):
    add("sess-1", display_name="x")
    add("sess-2", display_name="y")
    add("sess-3", display_name="z")
    assert found(db, session_id="sess-1") == ["sess-1"]
    assert found(db, session_id="sess-") == []
    assert found(db, session_id="sess-1", display_name="z") == ["sess-3", "sess-1"]


def test_metadata_pairs_must_all_hold_exactly(db, add):
    add("a", user_metadata={"k": "v", "quo\"te'": "ü", "$.x": "1"})
    add("b", user_metadata={"k": "V"})
    assert found(db, user_metadata={"k": "v"}) == ["a"]
    assert found(db, user_metadata={"quo\"te'": "ü", "$.x": "1"}) == ["a"]
    assert found(db, user_metadata={"k": "v", "other": "1"}) == []
    assert found(db, user_metadata={}) == ["b", "a"]


def test_projects_and_owners(db, add):
    add("a", project_id="p")
    add("b", project_id="q")
    add("c")
    assert found(db, project_ids=["p", "q", "nobody"]) == ["b", "a"]
    assert found(db, project_ids=[""]) == ["c"], "what a summary says of a session in no project finds it again"
    assert found(db, project_ids=[]) == []
    for owner in ({"type": "own"}, {"type": "accessible"}, {"type": "user", "owner_urns": ["x", "local"]}):
        assert found(db, owner=owner) == ["c", "b", "a"]
    assert found(db, owner={"type": "user", "owner_urns": ["x"]}) == []


@pytest.fixture
def fates(add):
    """One session for each fate."""
    add("active", job("active"))
    add("silent", job("silent", "done"), heartbeat_at=SILENT)
    add("idle", heartbeat_at=SILENT)
    add("failed", job("failed", "done"), job("failed"), heartbeat_at=SILENT)
    create = job("model", kind="create_model", seq_id=0, model_id="model:train:0", category="server", error="boom")
    add("model", create, heartbeat_at=SILENT)
    add("recovered", job("recovered"), job("recovered", "done"), heartbeat_at=SILENT)
    cancelled = job("gone", kind="sample", error="Cancelled: its session is over.")
    add("gone", job("gone", "done"), cancelled, job("gone", "pending"), heartbeat_at=SILENT)
    ended = {"finished_at": 9.0, "heartbeat_at": SILENT}
    add("success", job("success"), finish_reason="success", finish_detail="done", **ended)
    add("errored", finish_reason="errored", **ended)


@pytest.mark.usefixtures("fates")
def test_what_became_of_each(db):
    fate = {session.session_id: session.status for session in ask(db).sessions}
    assert {name: status.type for name, status in fate.items()} == {
        "active": "active",
        "silent": "cancelled",
        "idle": "cancelled",
        "failed": "failed",
        "model": "failed",
        "recovered": "cancelled",
        "gone": "cancelled",
        "success": "client_finished",
        "errored": "client_finished",
    }
    assert fate["silent"].detail == "No heartbeat since 1970-01-01T02:38:20+00:00."
    assert (fate["success"].reason.type, fate["success"].detail) == ("success", "done")
    assert fate["errored"].reason.type == "errored"
    assert (fate["failed"].category, fate["failed"].message) == ("user", "weights: no")
    assert (fate["failed"].reason.type, fate["failed"].reason.request_type) == ("request", "forward_backward")
    assert (fate["model"].category, fate["model"].message) == ("internal", "boom")
    assert fate["model"].reason.training_run_id == "model:train:0"


@pytest.mark.usefixtures("fates")
@pytest.mark.parametrize(
    ("statuses", "names"),
    [
        ([{"type": "active"}], "active"),
        ([{"type": "cancelled"}], "gone recovered idle silent"),
        ([{"type": "failed"}], "model failed"),
        ([{"type": "client_finished"}], "errored success"),
        ([{"type": "client_finished", "reasons": ["errored", "interrupted"]}], "errored"),
        ([{"type": "client_finished", "reasons": ["success"]}, {"type": "failed"}], "success model failed"),
    ],
)
def test_statuses_find_what_summaries_tell(db, statuses, names):
    assert found(db, statuses=statuses) == names.split()


def test_nobody_is_called_silent_before_the_server_could_have_heard_them(db, add):
    add("a", heartbeat_at=SILENT)
    add("b")
    unknown = {session.session_id: session.status for session in ask(db, silent_before=0.0).sessions}
    assert unknown["a"] is None
    assert unknown["b"].type == "active"
    every = [{"type": "active"}, {"type": "cancelled"}, {"type": "failed"}, {"type": "client_finished"}]
    assert [session.session_id for session in ask(db, silent_before=0.0, statuses=every).sessions] == ["b"]


def test_pages_cover_everything_once_whatever_is_created_meanwhile(db, add):
    for number in range(7):  # three pairs of the same time, and times that microseconds can't tell apart
        add(f"s{number}", created_at=1e9 + number // 2 * 1e-7, display_name="x" if number != 3 else "other")
    seen, cursor = [], None
    while True:
        page = ask(db, limit=2, cursor=cursor, display_name="x")
        seen += [session.session_id for session in page.sessions]
        if page.next_cursor is None:
            break
        assert len(page.sessions) == 2
        cursor = page.next_cursor
        add(f"new{len(seen)}", created_at=2e9, display_name="x")
    assert seen == ["s6", "s5", "s4", "s2", "s1", "s0"]


def test_a_cursor_whose_session_is_unknown_goes_by_its_time(db, add):
    add("a", created_at=10.0)
    add("b", created_at=20.0)
    cursor = {"last_created_at": "1970-01-01T00:00:15Z", "last_session_id": "zzz"}
    assert found(db, cursor=cursor) == ["a"]
