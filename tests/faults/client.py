"""A client that never gives up: every call goes on through dead servers, and what it was answered is kept and compared.

It speaks the wire by hand and is stricter than the SDK: submissions are sent twice now and then, as after a lost reply,
and must give the same request id; every result is fetched twice, and must be the same bytes both times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.support.server import BASE_MODEL
from tests.support.tenant import PROTOBUF, datum
from tx.tinker.wire import tinker_pb2

CALL_LIMIT_S = 120.0
"""A call that is not answered for so long after the last fault counts as hung."""

PATIENCE_S = 1800.0
"""Nor may faults keep anybody from an answer for ever."""


class Hung(AssertionError):
    """A future that nobody answered."""


class Lost(AssertionError):
    """A request that failed, or was answered differently the second time."""


@dataclass
class Client:
    """One session. ``resend`` is the share of submissions that are sent twice, ``last_fault`` when one last fired."""

    url: str
    rng: random.Random
    last_fault: Callable[[], float] = lambda: 0.0
    resend: float = 0.2
    answers: int = 0
    http: httpx.Client = field(init=False)
    session_id: str = field(init=False)

    def __post_init__(self) -> None:
        headers = {"X-API-Key": "tml-test", "x-idempotency-key": f"{self.rng.getrandbits(64):x}"}
        self.http = httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=40)
        self.session_id = self.call("create_session", tags=[], sdk_version="0.38.0").json()["session_id"]

    def call(self, route: str, /, content: bytes | None = None, **body: Any) -> httpx.Response:
        """POST until there is an answer that isn't "later"."""
        headers = {"content-type": PROTOBUF} if content is not None else {}
        began = time.monotonic()
        while time.monotonic() < min(max(began, self.last_fault()) + CALL_LIMIT_S, began + PATIENCE_S):
            try:
                if content is not None:
                    response = self.http.post(f"/{route}", content=content, headers=headers)
                else:
                    accept = {"accept": f"{PROTOBUF}, application/json"}
                    response = self.http.post(f"/{route}", json=body, headers=accept)
            except httpx.TransportError:
                time.sleep(0.05)  # the server is down: the SDK backs off too
                continue
            if response.status_code in (408, 429) or response.status_code >= 500:
                time.sleep(0.01)
                continue
            if response.status_code != 200:
                raise Lost(f"{route} {body}: {response.status_code} {response.text}")
            return response
        raise Hung(f"{route} {body}")

    def submit(self, route: str, /, content: bytes | None = None, **body: Any) -> str:
        """The request id; the same when it is sent again."""
        request_id = self.call(route, content, **body).json()["request_id"]
        if self.rng.random() < self.resend:
            again = self.call(route, content, **body).json()["request_id"]
            if again != request_id:
                raise Lost(f"{route} {body} became two jobs, {request_id} and {again}")
        return request_id

    def result(self, request_id: str) -> httpx.Response:
        """What the future says; asked twice."""
        first, second = (self.call("retrieve_future", request_id=request_id) for _ in range(2))
        if first.content != second.content:
            raise Lost(f"request {request_id} was answered twice, differently")
        if not first.headers["content-type"].startswith(PROTOBUF) and "error" in first.json():
            raise Lost(f"request {request_id} failed: {first.json()}")
        self.answers += 1
        return first

    def run(self, route: str, /, content: bytes | None = None, **body: Any) -> httpx.Response:
        """Submit and wait."""
        return self.result(self.submit(route, content, **body))


@dataclass
class Trainer:
    """One model of a session. Its data are a function of ``seed`` and the step."""

    client: Client
    number: int
    seed: int
    rank: int
    seq_id: int = 0

    @property
    def model_id(self) -> str:
        return f"{self.client.session_id}:train:{self.number}"

    def create(self) -> None:
        lora = {"rank": self.rank, "seed": self.seed, "train_unembed": True, "train_mlp": True, "train_attn": True}
        where = {"session_id": self.client.session_id, "model_seq_id": self.number}
        self.client.run("create_model", base_model=BASE_MODEL, lora_config=lora, **where)

    def create_from(self, path: str) -> None:
        where = {"session_id": self.client.session_id, "model_seq_id": self.number}
        self.client.run("load_weights", path=path, optimizer=True, **where)

    def sequenced(self, **body: Any) -> dict[str, Any]:
        self.seq_id += 1
        return {"model_id": self.model_id, "seq_id": self.seq_id} | body

    def chunk(self, step: int, part: int, seq_id: int) -> bytes:
        """Two datums, too long to be combined with other tenants', so that a pass has the same shapes every time."""
        message = tinker_pb2.ForwardBackwardRequest(model_id=self.model_id, seq_id=seq_id, loss_fn="cross_entropy")
        rng = np.random.default_rng((self.seed, step, part))
        for length in (70, 40):
            ids = rng.integers(0, 2000, length + 1)
            weights = np.ones(length, np.float32)
            message.data.append(datum(ids[:-1], target_tokens=ids[1:].astype(np.int64), weights=weights))
        return message.SerializeToString()

    def forward_backward(self, step: int) -> bytes:
        self.seq_id += 1
        return self.client.run("forward_backward", self.chunk(step, 0, self.seq_id)).content

    def forward_backward_in_chunks(self, step: int) -> list[bytes]:
        """As the SDK sends several: all but the first, then the first, then wait."""
        ids = [self.seq_id + 1, self.seq_id + 2, self.seq_id + 3]
        self.seq_id = ids[-1]
        submit = lambda part: self.client.submit("forward_backward", self.chunk(step, part, ids[part]))
        later = [submit(1), submit(2)]
        return [self.client.result(request_id).content for request_id in (submit(0), *later)]

    def optim_step(self, learning_rate: float, eps: float) -> dict[str, Any]:
        adam = {"learning_rate": learning_rate, "beta1": 0.9, "beta2": 0.95, "eps": eps}
        return self.client.run("optim_step", **self.sequenced(adam_params=adam)).json()

    def save(self, name: str) -> str:
        return self.client.run("save_weights", **self.sequenced(path=name)).json()["path"]

    def sample_here(self, number: int) -> bytes:
        """An unnamed snapshot, and two sequences drawn from it."""
        saved = self.client.run(
            "save_weights_for_sampler", **self.sequenced(sampling_session_seq_id=number, kind="snapshot")
        ).json()
        return self.client.run(
            "asample",
            sampling_session_id=saved["sampling_session_id"],
            seq_id=0,
            num_samples=2,
            prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            sampling_params={"max_tokens": 24, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 11, "stop": []},
        ).content
