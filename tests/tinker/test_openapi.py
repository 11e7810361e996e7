"""The OpenAPI document is complete and true: nothing is missing from it, and what is answered is in it.

Besides, every reply in ``tests/tinker`` is held against it (``tests.tinker.conftest.Client``).
"""

from __future__ import annotations

import logging

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from tests.openapi.lab import Lab
from tests.support.openapi import METHODS, Document
from tx.tinker.api import PREFIX, ROUTERS, create_app
from tx.tinker.openapi import tag_of

CASES = 300
SEED = 0


@pytest.fixture
def document(service) -> dict:
    return create_app(service).openapi()


def operations(document: dict) -> dict[tuple[str, str], dict]:
    return {
        (path, method): item[method] for path, item in document["paths"].items() for method in METHODS if method in item
    }


def test_every_route_is_an_operation_and_the_other_way_round(document):
    routes = {
        (PREFIX + route.path_format, method.lower())
        for module in ROUTERS
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert operations(document).keys() == routes
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)


def test_every_answer_has_a_schema_and_every_operation_a_text_and_a_tag(document):
    tags = {tag["name"] for tag in document["tags"]}
    assert tags == {tag_of(module) for module in ROUTERS}
    for key, operation in operations(document).items():
        assert operation["description"], key
        assert set(operation["tags"]) <= tags, key
        for status, answer in operation["responses"].items():
            assert answer["description"], (key, status)
            if status != "302":
                assert all(content["schema"] for content in answer["content"].values()), (key, status)
        assert {"400", "413", "500"} <= operation["responses"].keys()
        for status, answer in operation["responses"].items():
            if status[0] in "45" and status != "408" and key[0] != f"{PREFIX}/healthz":
                assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}, key


def test_every_body_has_a_schema(document):
    for (path, method), operation in operations(document).items():
        if method in ("post", "put") and not path.endswith(("/publish", "/auth/token")):
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"], path
    for name in ("forward", "forward_backward"):
        body = document["paths"][f"{PREFIX}/{name}"]["post"]["requestBody"]
        assert body["content"].keys() == {"application/json", "application/x-protobuf"}
        assert body["required"]


def test_nothing_is_left_of_what_fastapi_would_answer(document):
    assert "webhooks" not in document
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()


def test_a_key_may_be_sent_and_need_not_be(document):
    assert document["security"] == [{}, {"ApiKey": []}]
    assert document["components"]["securitySchemes"]["ApiKey"]["name"] == "X-API-Key"
    for (path, _), operation in operations(document).items():
        is_open = path.startswith((f"{PREFIX}/healthz", f"{PREFIX}/livez", f"{PREFIX}/files/"))
        assert ("401" not in operation["responses"]) == is_open == (operation.get("security") == [])
    assert "429" not in document["paths"][f"{PREFIX}/session_heartbeat"]["post"]["responses"]


def test_it_is_served_with_pages_to_read_it(service, document):
    with TestClient(create_app(service)) as client:
        assert client.get("/openapi.json").json() == document
        assert "swagger" in client.get("/docs").text
        assert "redoc" in client.get("/redoc").text


@pytest.mark.parametrize(
    "content", [b'{"type": "later", "request_id": "1"}', b'{"request_id": 1}', b"[]", b'{"queue_state": "asleep"}']
)
def test_a_reply_that_is_not_the_declared_one_is_found(client, content):
    client.service.hold_s = 0.0
    reply = client.post("retrieve_future", json={"request_id": client.sample(client.new_sampler())["request_id"]})
    checked = Document(client.app.openapi())
    checked.check(reply)
    reply._content = content
    with pytest.raises(AssertionError, match="answered 408"):
        checked.check(reply)


@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(tmp_path, caplog):
    """A few cases of each operation, the same in every run; ``python -m tests.openapi`` sends thousands."""
    caplog.set_level(logging.CRITICAL)
    with Lab(tmp_path, f"sqlite:///{tmp_path / 'tx.db'}", SEED) as lab:
        found = lab.operations()
        for operation in found:
            lab.fuzz(operation, CASES / len(found))
        assert lab.sent >= CASES
        assert not lab.failures, lab.report()
        assert lab.share_of_successes() > 0.2, "live ids lead past the 404s"


@pytest.mark.timeout(600)
def test_hostile_values_are_refused_by_both_databases(tmp_path, database_url, caplog):
    caplog.set_level(logging.CRITICAL)
    with Lab(tmp_path, database_url, SEED) as lab:
        for operation in lab.operations():
            lab.send_hostile(operation, every=11)
        assert not lab.failures, lab.report()
