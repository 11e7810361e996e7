"""Ids and names that would leave their folder: every route that has one in its address or body refuses them."""

from __future__ import annotations

import re

import pytest

from tests.tinker.routes.test_isolation import routes

CANARY = "what lies outside of the checkpoints' folder"

HOSTILE = [
    "%2e%2e",
    "..%2f..%2f..%2fsecret",
    "%2e%2e%2f%2e%2e%2fsecret",
    "..%5c..%5csecret",
    "%252e%252e%252fsecret",
    "%2fetc%2fpasswd",
    "secret%00.safetensors",
    "weights%2f..%2f..%2f..%2fsecret",
    "~",
    "a" * 5000,
]


@pytest.fixture
def secret(config):
    config.data_folder.mkdir(exist_ok=True)
    file = config.data_folder / "secret"
    file.write_text(CANARY)
    return file


def test_no_address_leads_out(client, running, secret):
    model = client.new_model()
    client.result(client.ask("save_weights", model_id=model, seq_id=1, path="ck"))
    good = {"model_id": model, "kind": "weights", "name": "ck", "checkpoint_id": "weights/ck", "file": "secret"}
    asked = 0
    for route in routes(client):
        method, path = route.split(" ")
        path = path.replace(":path", "").removeprefix("/")
        for name in re.findall(r"{(\w+)}", path):
            for bad in HOSTILE:
                url = path.replace("{" + name + "}", bad)
                for other, value in (good | {"session_id": "s", "sampler_id": "s"}).items():
                    url = url.replace("{" + other + "}", value)
                reply = client.request(method, url, json={"ttl_seconds": 3600} if path.endswith("ttl") else None)
                asked += 1
                assert 400 <= reply.status_code < 500, (route, name, bad, reply.status_code)
                assert CANARY not in reply.text
    assert asked > 200
    assert secret.read_text() == CANARY


@pytest.mark.parametrize("bad", ["../../secret", "..", "/etc/passwd", "a/../../secret", "a\\..\\b", "a\0b", "~/x", ""])
def test_no_name_in_a_body_leads_out(client, running, bad):
    model, session = client.new_model(), client.new_session()
    for seq, route in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
        reply = client.post(route, json={"model_id": model, "seq_id": seq, "path": bad, "type": route})
        # Or a future, which the engine fails: test_engine_storage and test_paths have the names that it refuses.
        assert reply.status_code in (200, 400), route
    for path in (bad, f"tinker://{model}/weights/{bad}", f"tinker://{bad}/weights/ck", f"tinker://{model}/{bad}/ck"):
        for route, body in (
            ("weights_info", {"tinker_path": path}),
            ("copy_weights", {"source_path": path}),
            ("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}),
        ):
            reply = client.post(route, json=body)
            assert reply.status_code in (400, 404, 422), (route, path)
        body = {"model_id": model, "seq_id": 10 + len(path), "path": path, "optimizer": False}
        reply = client.post("load_weights", json=body)
        assert reply.status_code == 400 or client.result(reply.json())["category"] == "user", path
