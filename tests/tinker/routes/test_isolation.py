"""Two API keys on one server: to each, what belongs to the other does not exist. Every route of the app is asked."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.routing import APIRoute

from tests.tinker.conftest import ALIAS, Client
from tests.tinker.routes.test_training import JSON_INPUT
from tx.tinker import keys
from tx.tinker.db import Checkpoint, now, writing

NEEDS_NO_KEY = {
    "GET /healthz",
    "GET /livez",
    "GET /files/{model_id}/{kind}/{name}/{file}",
    "GET /files/{model_id}/{kind}/{name}",
    "GET /files/{session_id}/trace",
}
"""The files are for who has their signed URL: test_files and test_admin show that nobody else gets them."""

NAMES_NOTHING = {
    "POST /client/config",
    "POST /client/dynamic_config",
    "GET /get_server_capabilities",
    "POST /telemetry",  # never refused; what is kept of it: below
    "POST /auth/token",
    "GET /auth/apikey/me",
    "DELETE /auth/apikey/me",
    "GET /metrics",
    "POST /create_session",
    "POST /create_custom_loss",
}
"""Routes without an id and without a listing of what somebody owns."""

LISTS = {
    "GET /sessions",
    "GET /sessions?access_scope=accessible",
    "POST /sessions/search",
    "GET /training_runs",
    "GET /training_runs?access_scope=accessible",
    "GET /checkpoints",
    "GET /billing/usage/events",
    "GET /billing/usage/checkpoints/current",
    "GET /audit",
    "GET /telemetry",
}
"""Routes that list: what is in them is compared below."""

BODIES = {
    "POST /session_heartbeat": lambda w: {"session_id": w["session_id"]},
    "POST /sessions/{session_id}/finish": lambda w: {"reason": {"type": "success"}},
    "PUT /sessions/{session_id}/project": lambda w: {"project_id": "p"},
    "POST /create_model": lambda w: w["new"] | {"base_model": ALIAS, "lora_config": {"rank": 8}},
    "POST /get_info": lambda w: {"model_id": w["model_id"]},
    "POST /unload_model": lambda w: {"model_id": w["model_id"]},
    "POST /forward": lambda w: w["step"] | {"forward_input": JSON_INPUT},
    "POST /forward_backward": lambda w: w["step"] | {"forward_backward_input": JSON_INPUT},
    "POST /optim_step": lambda w: w["step"] | {"adam_params": {}},
    "POST /save_weights": lambda w: w["step"] | {"path": f"more{w['n']}"},
    "POST /save_weights_for_sampler": lambda w: w["step"] | {"path": f"more{w['n']}"},
    "POST /save_weights_external": lambda w: w["step"] | {"path": f"more{w['n']}", "type": "save_weights_external"},
    "POST /copy_weights": lambda w: {"source_path": w["path"]},
    "POST /load_weights": lambda w: w["step"] | {"path": w["path"], "optimizer": False},
    "POST /weights_info": lambda w: {"tinker_path": w["path"]},
    "POST /create_sampling_session": lambda w: {
        "session_id": w["session_id"], "sampling_session_seq_id": w["n"], "base_model": ALIAS,
    },
    "POST /join_sampling_session": lambda w: {"sampling_session_id": w["sampler_id"]},
    "POST /asample": lambda w: {
        "sampling_session_id": w["sampler_id"], "seq_id": w["n"], "prompt": {"chunks": [{"tokens": [1]}]},
    },
    "POST /retrieve_future": lambda w: {"request_id": w["request_id"]},
    "POST /cancel_future": lambda w: {"request_id": w["request_id"]},
    "POST /retrieve_futures": lambda w: {
        "target": {"type": "sampling_session", "sampling_session_id": w["sampler_id"]}, "prev_cursor": 0,
    },
}  # fmt: skip
"""What a route without an id in its path is asked about, in its body: one entry each."""

LAST = ["POST /unload_model", "DELETE /training_runs/{model_id}/checkpoints/{checkpoint_id:path}"]
LAST += ["POST /sessions/{session_id}/finish"]
"""After these the others would find nothing any more."""


@pytest.fixture
def config(config, tmp_path):
    return config.model_copy(update={"api_keys_file": tmp_path / "keys"})


@pytest.fixture
def make_key(config):
    return lambda name, **limits: keys.add(config.api_keys_file, name, **limits)


@pytest.fixture
def pair(make_key, request):
    """Two clients of one server, with different keys."""
    given = [make_key(name) for name in ("alice", "bob")]
    service = request.getfixturevalue("service")  # only now: the file is read when the service starts
    request.getfixturevalue("running")
    clients = [Client(service) for _ in given]
    for client, key in zip(clients, given, strict=True):
        client.headers["X-API-Key"] = key
    with clients[0], clients[1]:
        yield clients


def world(client: Client) -> dict:
    """One of everything that a client can own."""
    session = client.new_session()
    model, sampler = client.new_model(session), client.new_sampler(session)
    future = client.sample(sampler)
    client.result(future)
    path = client.result(client.ask("save_weights", model_id=model, seq_id=1, path="ck"))["path"]
    with writing(client.service.db) as db:
        external = Checkpoint(model_id=model, kind="external_weights", name="ck", folder=f"{model}/external_weights/ck")
        external.size_bytes, external.created_at = 5, now()
        db.add(external)
    client.ask("telemetry", events=[{"event": "GENERIC_EVENT"}], session_id=session)
    return {
        "session_id": session, "model_id": model, "sampler_id": sampler, "request_id": future["request_id"],
        "path": path, "checkpoint_id": "weights/ck", "kind": "weights", "name": "ck",
    }  # fmt: skip


def walk(found):
    for route in found:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from walk(route.original_router.routes)


def routes(client: Client) -> list[str]:
    found = {f"{method} {route.path}" for route in walk(client.app.routes) for method in route.methods}
    assert len(found) > 50
    return sorted(found - set(LAST)) + LAST


def call(client: Client, route: str, of: dict, n: int):
    """One request about what is ``of`` somebody; ``n`` is a number that was not used before."""
    method, path = route.split(" ")
    about = of | {"n": n, "new": {"session_id": of["session_id"], "model_seq_id": n}}
    about["step"] = {"model_id": of["model_id"], "seq_id": n}
    body = BODIES[route](about) if route in BODIES else {"ttl_seconds": 3600} if path.endswith("/ttl") else None
    sent = {} if body is None else {"json": body}
    url = path.replace(":path", "").format(**about).removeprefix("/")
    return client.request(method, url, follow_redirects=False, **sent)


def with_ids(client: Client) -> list[str]:
    """Every route that names something somebody owns. A new route must be in one of the tables above, or name an id."""
    plain = {route for route in LISTS if "?" not in route}
    rest = [route for route in routes(client) if route not in NEEDS_NO_KEY | NAMES_NOTHING | plain]
    unknown = [route for route in rest if "{" not in route and route not in BODIES]
    assert unknown == [], "say in this file what these routes are asked about"
    return rest


def test_every_route_with_an_id_hides_anothers(pair):
    alice, bob = pair
    hers, numbers = world(alice), itertools.count(2)
    told = [route for route in with_ids(alice) if call(bob, route, hers, next(numbers)).status_code != 404]
    assert told == []
    numbers = itertools.count(2)
    replies = {route: call(alice, route, hers, next(numbers)) for route in with_ids(alice)}
    refused = {route: reply.text for route, reply in replies.items() if reply.status_code == 404}
    # There are no files behind the external checkpoint of this test: its owner gets as far as them.
    assert all("external_weights_urls" in route for route in refused), refused


def test_what_does_not_exist_and_what_is_anothers_look_the_same(pair):
    alice, bob = pair
    hers = world(alice)
    nobodys = {key: value.replace(hers["session_id"], "sess-nobody") for key, value in hers.items()}
    nobodys["request_id"] = "999999"
    for n, route in enumerate(with_ids(alice), 2):
        theirs, none = (call(bob, route, of, n) for of in (hers, nobodys))
        assert theirs.status_code == none.status_code == 404, route
        told = theirs.text.replace(hers["session_id"], "sess-nobody").replace(hers["request_id"], "999999")
        assert told == none.text.replace("9999999", "999999"), route


def test_every_route_needs_a_key_but_a_few(pair):
    alice, _ = pair
    hers = world(alice)
    hers["file"] = "f"
    for given in ({}, {"X-API-Key": "tml-wrong"}, {"X-API-Key": ""}, {"Authorization": "Bearer tml-wrong"}):
        stranger = Client(alice.service)
        stranger.headers.update(given)
        open_ = {route for n, route in enumerate(routes(alice), 2) if call(stranger, route, hers, n).status_code != 401}
        assert open_ == NEEDS_NO_KEY
    reply = stranger.get("sessions")
    assert "X-API-Key" in reply.json()["detail"]
    assert "www-authenticate" not in reply.headers
    assert stranger.get("no/such/route").status_code == 401


def test_listings_have_ones_own(pair):
    alice, bob = pair
    hers, his = world(alice), world(bob)
    opens = datetime.now(UTC) - timedelta(hours=1)
    hour = {
        "starting_on": f"{opens:%Y-%m-%dT%H}:00:00Z",
        "ending_before": f"{opens + timedelta(hours=3):%Y-%m-%dT%H}:00:00Z",
    }
    alice.post(f"training_runs/{hers['model_id']}/checkpoints/external_weights/ck/publish")  # an entry in the audit log
    for route in sorted(LISTS):
        method, path = route.split(" ")
        query = hour if "usage/events" in path else {}
        sent = {"json": {}} if method == "POST" else {"params": query} if query else {}
        texts = [client.request(method, path.removeprefix("/"), **sent).text for client in (alice, bob)]
        if "checkpoints/current" in path:
            assert [json.loads(text)["data"][0]["checkpoint_count"] for text in texts] == [2, 2]
            continue
        if "audit" not in path:
            assert hers["session_id"] in texts[0], route
            assert his["session_id"] in texts[1], route
        assert his["session_id"] not in texts[0], route
        if path != "/training_runs?access_scope=accessible":  # hers is published
            assert hers["session_id"] not in texts[1], route
    assert hers["session_id"] in alice.get("audit").text
    owners = [client.post("sessions/search", json={}).json()["sessions"][0]["owner"] for client in (alice, bob)]
    assert owners == ["alice", "bob"]
    by_name = {"owner": {"type": "user", "owner_urns": ["bob"]}}
    found = [client.post("sessions/search", json=by_name).json()["sessions"] for client in (alice, bob)]
    assert [len(each) for each in found] == [0, 1]


def test_a_published_checkpoint_can_be_used_by_others_and_changed_by_none(pair):
    alice, bob = pair
    hers = world(alice)
    mine = bob.new_session()
    about = f"training_runs/{hers['model_id']}"
    use = {
        "weights_info": {"tinker_path": hers["path"]},
        "copy_weights": {"source_path": hers["path"]},
        "create_sampling_session": {"session_id": mine, "sampling_session_seq_id": 5, "model_path": hers["path"]},
    }
    create = {"session_id": mine, "model_seq_id": 3, "path": hers["path"], "optimizer": False}
    for route, body in use.items():
        bob.ask(route, 404, **body)
    assert bob.result(bob.ask("load_weights", **create))["category"] == "user"
    model = bob.new_model(mine)
    bob.ask("load_weights", 404, model_id=model, seq_id=1, path=hers["path"], optimizer=False)

    assert alice.post(f"{about}/checkpoints/weights/ck/publish").status_code == 200
    for route, body in use.items():
        bob.ask(route, 200, **body)
    loaded = bob.result(bob.ask("load_weights", **create | {"model_seq_id": 4}))
    assert loaded["model_id"] == f"{mine}:train:4"
    bob.ask("load_weights", 200, model_id=model, seq_id=1, path=hers["path"], optimizer=False)
    assert bob.get(f"{about}/checkpoints/weights/ck/archive", headers={"accept": "application/json"}).status_code == 200
    for method, end in (("POST", "/publish"), ("DELETE", "/publish"), ("DELETE", "")):
        assert bob.request(method, f"{about}/checkpoints/weights/ck{end}").status_code == 404
    assert bob.put(f"{about}/checkpoints/weights/ck/ttl", json={"ttl_seconds": None}).status_code == 404
    assert bob.get(about).status_code == 404
    seen = bob.get(about, params={"access_scope": "accessible"}).json()
    assert seen["model_owner"] == "alice"
    assert seen["last_checkpoint"]["tinker_path"] == hers["path"]
    bob.ask("get_info", 404, model_id=hers["model_id"])


def test_the_idempotency_key_of_another_is_not_ones_own(pair):
    alice, bob = pair
    made = [
        client.post("create_session", json={}, headers={"X-Idempotency-Key": "same"}).json()["session_id"]
        for client in (alice, bob, alice)
    ]
    assert made[0] == made[2] != made[1]


def test_telemetry_about_anothers_session_is_dropped(pair):
    alice, bob = pair
    session = alice.new_session()
    for client in (alice, bob):
        assert client.ask("telemetry", events=[{"event": "GENERIC_EVENT"}], session_id=session)["status"] == "accepted"
    assert len(alice.get("telemetry").json()["events"]) == 1


def test_without_a_key_file_all_is_everybodys(pair, config, tmp_path):
    from tx.tinker.db import open_database
    from tx.tinker.service import Service

    hers = world(pair[0])
    open_server = Service(
        config.model_copy(update={"api_keys_file": None}), open_database(config.resolved_database_url)
    )
    with Client(open_server) as anybody:
        assert anybody.get(f"sessions/{hers['session_id']}").status_code == 200
        fresh = anybody.new_session()
    open_server.close()
    assert pair[0].get(f"sessions/{fresh}").status_code == 404  # it is the local user's


def test_a_keys_share_of_the_queue_bounds_its_samples_alone(make_key, request):
    bounded, free = make_key("bounded", max_queued_samples=3), make_key("free")
    service = request.getfixturevalue("service")
    request.getfixturevalue("engine")  # which answers nothing: what is asked stays in the queue
    clients = [Client(service), Client(service)]
    for client, key in zip(clients, (bounded, free), strict=True):
        client.headers["X-API-Key"] = key
    first, other = clients
    sampler = first.new_sampler()
    first.sample(sampler, 1, num_samples=2)
    reply = first.sample(sampler, 2, status=429, num_samples=2)
    assert "2 sequences of this API key" in reply["detail"]
    first.sample(sampler, 1, num_samples=2)  # the same request again is no further one
    first.sample(sampler, 3)
    first.sample(sampler, 4, status=429)
    assert "at most 3" in first.sample(sampler, 5, status=400, num_samples=4)["detail"]
    first.ask("create_model", session_id=first.new_session(), model_seq_id=0, base_model=ALIAS, lora_config={"rank": 8})
    theirs = other.new_sampler()
    [other.sample(theirs, n) for n in range(5)]


def test_a_keys_rate_bounds_its_requests_but_not_its_heartbeats(make_key, request):
    slow = make_key("slow", max_requests_per_s=0.001)
    client = Client(request.getfixturevalue("service"))
    client.headers["X-API-Key"] = slow
    session = client.new_session()
    reply = client.post("create_session", json={})
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) > 900
    assert "0.001 requests per second" in reply.json()["detail"]
    assert client.post("session_heartbeat", json={"session_id": session}).status_code == 200
