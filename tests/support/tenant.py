"""A tenant that speaks the wire protocol by hand, so that tests can send what the SDK never would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.support.server import BASE_MODEL
from tx.tinker.wire import tinker_pb2

PROTOBUF = "application/x-protobuf"
_DTYPES = {"float32": tinker_pb2.DTYPE_FLOAT32, "int64": tinker_pb2.DTYPE_INT64, "int32": tinker_pb2.DTYPE_INT32}


@dataclass
class Outcome:
    """What became of a future: its JSON (results and failures) or its protobuf bytes."""

    json: dict[str, Any] | None
    protobuf: bytes | None

    @property
    def error(self) -> str | None:
        return None if self.json is None else self.json.get("error")


def tensor(array: np.ndarray) -> tinker_pb2.Tensor:
    """A dense tensor of the array's own dtype."""
    return tinker_pb2.Tensor(dense=array.tobytes(), dtype=_DTYPES[array.dtype.name], shape=list(array.shape))


def datum(tokens: Any, **inputs: np.ndarray | tinker_pb2.Tensor) -> tinker_pb2.Datum:
    """A datum with one text chunk."""
    message = tinker_pb2.Datum()
    message.model_input.add().encoded_text.tokens = np.asarray(tokens, np.int32).tobytes()
    for name, value in inputs.items():
        encoded = tensor(value) if isinstance(value, np.ndarray) else value
        message.loss_fn_inputs[name].CopyFrom(encoded)
    return message


def good_datum(length: int = 8, seed: int = 0) -> tinker_pb2.Datum:
    """A valid cross_entropy datum of the tests' vocabulary."""
    ids = np.random.default_rng(seed).integers(0, 2000, length + 1)
    return datum(ids[:-1], target_tokens=ids[1:].astype(np.int64), weights=np.ones(length, np.float32))


@dataclass
class Tenant:
    """One session with one model, created at once."""

    http: httpx.Client
    rank: int = 4
    seed: int = 0
    session_id: str = ""
    model_id: str = ""
    seq_id: int = 0
    sampler_seq: int = 0
    samplers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session_id = self.ok("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        lora = {"rank": self.rank, "seed": self.seed, "train_unembed": True, "train_mlp": True, "train_attn": True}
        created = self.ok(
            "create_model", session_id=self.session_id, model_seq_id=0, base_model=BASE_MODEL, lora_config=lora
        )
        self.model_id = self.json(created["request_id"])["model_id"]

    def post(self, endpoint: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/{endpoint}", json=body)

    def ok(self, endpoint: str, /, **body: Any) -> dict[str, Any]:
        response = self.post(endpoint, **body)
        assert response.status_code == 200, f"{endpoint}: {response.status_code} {response.text}"
        return response.json()

    def next_seq(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def request(self, data: list[tinker_pb2.Datum], **fields: Any) -> tinker_pb2.ForwardBackwardRequest:
        """A forward_backward message of this model with the next seq_id; ``fields`` replace or add."""
        message = tinker_pb2.ForwardBackwardRequest(
            **({"model_id": self.model_id, "seq_id": self.next_seq(), "loss_fn": "cross_entropy"} | fields)
        )
        message.data.extend(data)
        return message

    def send(self, body: bytes | tinker_pb2.ForwardBackwardRequest, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else body.SerializeToString()
        sent = {"content-type": PROTOBUF} | {key.replace("_", "-"): value for key, value in headers.items()}
        return self.http.post("/forward_backward", content=content, headers=sent)

    def outcome(self, request_id: str) -> Outcome:
        """Long-poll a future to its end."""
        for _ in range(20):
            accept = {"accept": f"{PROTOBUF}, application/json"}
            response = self.http.post("/retrieve_future", json={"request_id": request_id}, headers=accept)
            if response.status_code != 408:
                break
            assert response.json()["type"] == "try_again"
        assert response.status_code == 200, f"{response.status_code} {response.text}"
        if response.headers["content-type"].startswith(PROTOBUF):
            return Outcome(None, response.content)
        return Outcome(response.json(), None)

    def json(self, request_id: str) -> dict[str, Any]:
        """The JSON result of a future that must succeed."""
        outcome = self.outcome(request_id)
        assert outcome.json is not None
        assert outcome.error is None, outcome.json
        return outcome.json

    def forward_backward(self, data: list[tinker_pb2.Datum], **fields: Any) -> tinker_pb2.ForwardBackwardOutput:
        """Submit, wait, decode."""
        response = self.send(self.request(data, **fields))
        assert response.status_code == 200, response.text
        outcome = self.outcome(response.json()["request_id"])
        assert outcome.protobuf is not None, outcome.json
        return tinker_pb2.ForwardBackwardOutput.FromString(outcome.protobuf)

    def optim_step(self, learning_rate: float = 1e-2) -> dict[str, Any]:
        """One AdamW step, waited for."""
        adam = {"learning_rate": learning_rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        reply = self.ok("optim_step", model_id=self.model_id, seq_id=self.next_seq(), adam_params=adam)
        return self.json(reply["request_id"])

    def sampler(self, **source: str) -> str:
        """A sampling session on ``base_model=`` or ``model_path=``."""
        reply = self.ok(
            "create_sampling_session",
            session_id=self.session_id,
            sampling_session_seq_id=self.sampler_seq,
            **(source or {"base_model": BASE_MODEL}),
        )
        self.sampler_seq += 1
        return reply["sampling_session_id"]

    def sample_body(self, sampler: str, tokens: Any = (1, 2, 3), **fields: Any) -> dict[str, Any]:
        """The JSON of an asample request; ``params`` is merged into its sampling_params."""
        seq = self.samplers.get(sampler, 0)
        self.samplers[sampler] = seq + 1
        params = {"max_tokens": 4, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 1} | fields.pop("params", {})
        return {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]},
            "sampling_params": params,
        } | fields

    def sample(self, sampler: str, tokens: Any = (1, 2, 3), **fields: Any) -> tinker_pb2.SampleResponse:
        """Submit, wait, decode."""
        reply = self.ok("asample", **self.sample_body(sampler, tokens, **fields))
        outcome = self.outcome(reply["request_id"])
        assert outcome.protobuf is not None, outcome.json
        return tinker_pb2.SampleResponse.FromString(outcome.protobuf)
