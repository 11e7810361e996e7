"""Sessions of older SDKs, recorded at the wire, replayed against the real server.

Each recording is what one version of the real SDK sent during the same small program (create, train with two losses,
forward, step, save, sample, compute logprobs, load), with the answers it then accepted from a stand-in server. The
newest SDK needs no recording: the e2e tests run it. A recorded answer is only evidence of form: which keys, which
content type. Ids are translated, the rank is lowered to what the tests' server allows.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.support.server import BASE_MODEL, Server
from tx.tinker.wire import tinker_pb2

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("sdk-*.json"))
RECORDED_MODEL = "Qwen/Qwen3-8B"


class Replay:
    """Sends one recording; translates the stand-in's ids to the server's."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session = ""
        self.requests: dict[str, str] = {}
        self.origin: dict[str, str] = {}  # request id -> path that made it

    def translate(self, value: Any) -> Any:
        text = json.dumps(value)
        text = re.sub(r"sess-\d+", self.session, text).replace(RECORDED_MODEL, BASE_MODEL)
        for recorded, real in self.requests.items():
            text = text.replace(f'"{recorded}"', f'"{real}"')
        return json.loads(text.replace('"rank": 32', '"rank": 8'))

    def send(self, entry: dict[str, Any]) -> httpx.Response:
        headers = {key: value for key, value in entry["headers"].items() if key != "content-type"}
        url = "/" + self.translate(entry["path"]) + ("?" + entry["query"] if entry.get("query") else "")
        if "proto" in entry:
            message = json_format.ParseDict(self.translate(entry["proto"]), tinker_pb2.ForwardBackwardRequest())
            headers["content-type"] = "application/x-protobuf"
            return self.http.request(entry["method"], url, content=message.SerializeToString(), headers=headers)
        content = self.translate(entry["json"]) if "json" in entry else None
        response = self.http.request(entry["method"], url, json=content, headers=headers)
        while response.status_code == 408:
            response = self.http.request(entry["method"], url, json=content, headers=headers)
        return response

    def step(self, entry: dict[str, Any]) -> None:
        response = self.send(entry)
        where = f"{entry['method']} {entry['path']} {entry.get('json')}"
        assert response.status_code == entry["reply"]["status"], f"{where}: {response.status_code} {response.text}"
        assert ("protobuf" in response.headers["content-type"]) == entry["reply"]["protobuf"], where
        if entry["reply"]["protobuf"]:
            self.check_protobuf(entry, response.content)
            return
        answer, recorded = response.json(), entry["reply"].get("json") or {}
        assert "error" not in answer, f"{where}: {answer}"
        missing = {key for key, value in recorded.items() if value is not None} - set(answer)
        assert missing - {"queue_state"} == set(), f"{where}: {answer}"
        if "type" in recorded:
            assert answer.get("type") == recorded["type"], where
        if entry["path"] == "create_session":
            self.session = answer["session_id"]
        if "request_id" in recorded:
            self.requests[recorded["request_id"]] = answer["request_id"]
            self.origin[recorded["request_id"]] = entry["path"]
        if "loss_fn_outputs" in recorded:
            assert answer["metrics"]["loss:sum"] != 0.0
            shapes = [output["logprobs"]["shape"] for output in answer["loss_fn_outputs"]]
            assert shapes == [output["logprobs"]["shape"] for output in recorded["loss_fn_outputs"]]

    def check_protobuf(self, entry: dict[str, Any], content: bytes) -> None:
        made_by = self.origin[entry["json"]["request_id"]]
        if made_by == "asample":
            sample = tinker_pb2.SampleResponse.FromString(content)
            assert len(sample.sequences[0].tokens) == len(sample.sequences[0].logprobs) > 0
        else:
            output = tinker_pb2.ForwardBackwardOutput.FromString(content)
            assert "loss:sum" in output.metrics
            assert output.loss_fn_outputs[0].fields["logprobs"].data


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_recorded_session(server: Server, recording: Path) -> None:
    entries = json.loads(recording.read_text())
    assert len(entries) > 20
    with server.client() as http:
        replay = Replay(http)
        for entry in entries:
            replay.step(entry)
        assert len(replay.requests) >= 10


def test_recordings_are_there() -> None:
    assert len(RECORDINGS) >= 6
