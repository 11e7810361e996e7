"""Malformed requests over real HTTP: each is refused by the name of its field, and nobody else notices.

A row is (id, words of which one must appear in the refusal, how to send it). A refusal is a 4xx with a non-empty
``detail``, or 200 and a future that fails with category "user". Two well-behaved tenants frame the table: what the
bystander measures while the table runs must equal, bit for bit, what the same tenant measured alone.
"""

import http.client
import json
import zlib
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
import zstandard

from tests.support.server import BASE_MODEL, Server
from tests.support.tenant import PROTOBUF, Tenant, datum, good_datum, tensor
from tx.tinker.wire import tinker_pb2

Send = Callable[[Tenant], httpx.Response]

CONTEXT = 512
IDS = np.arange(1, 9, dtype=np.int64)
ONES = np.ones(8, np.float32)
RL = {"target_tokens": IDS, "logprobs": -ONES, "advantages": ONES}


# ---- how to send one wrong thing ------------------------------------------------------------------------------------


def call(endpoint: str, /, **body: object) -> Send:
    """POST JSON; "$session", "$model", "$other" become ids, "$seq" the model's next seq_id."""

    def send(tenant: Tenant) -> httpx.Response:
        known = {"$session": tenant.session_id, "$model": tenant.model_id}
        filled = {key: known.get(value, value) if isinstance(value, str) else value for key, value in body.items()}
        if filled.get("seq_id") == "$seq":
            filled["seq_id"] = tenant.next_seq()
        return tenant.post(endpoint, **filled)

    return send


def text(endpoint: str, body: str) -> Send:
    return lambda tenant: tenant.http.post(
        f"/{endpoint}",
        content=body.replace("$session", tenant.session_id).replace("$model", tenant.model_id),
        headers={"content-type": "application/json"},
    )


def get(path: str) -> Send:
    return lambda tenant: tenant.http.get(f"/{path}")


def model(**lora_or_fields: object) -> Send:
    """create_model with ``lora_config`` entries replaced; fields of the request itself by their own name."""
    own = ("session_id", "model_seq_id", "base_model", "optimizer_config", "lora_config")
    fields = {key: lora_or_fields.pop(key) for key in own if key in lora_or_fields}
    body = {
        "session_id": "$session",
        "model_seq_id": 900 + zlib.crc32(f"{lora_or_fields}{fields}".encode()) % 10**6,
        "base_model": BASE_MODEL,
        "lora_config": {"rank": 4, "seed": 0} | lora_or_fields,
    }
    return call("create_model", **(body | fields))


def adam(**params: object) -> Send:
    return call("optim_step", model_id="$model", seq_id="$seq", adam_params={"learning_rate": 1e-3} | params)


def train(*data: tinker_pb2.Datum, **fields: object) -> Send:
    return lambda tenant: tenant.send(tenant.request(list(data), **fields))


def loss(name: str, config: dict[str, float] | None = None, **inputs: object) -> Send:
    given = {key: value for key, value in inputs.items() if value is not None}
    values = {key: tinker_pb2.LossConfigValue(number=value) for key, value in (config or {}).items()}
    return train(datum(IDS, **given), loss_fn=name, loss_fn_config_v2=values)


def body(change: Callable[[bytes], bytes], **headers: str) -> Send:
    """A good forward_backward body, changed on its way."""
    return lambda tenant: tenant.send(change(tenant.request([good_datum()]).SerializeToString()), **headers)


def sample(tokens: object = (1, 2, 3), **fields: object) -> Send:
    return lambda tenant: tenant.post("asample", **tenant.sample_body(base_sampler(tenant), tokens, **fields))


def chunk(**content: object) -> Send:
    return sample(prompt={"chunks": [content]})


def base_sampler(tenant: Tenant) -> str:
    return next(iter(tenant.samplers), None) or tenant.sampler()


def huge_body(tenant: Tenant) -> httpx.Response:
    """200 MB announced and sent, until the server has had enough."""
    url = tenant.http.base_url
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    connection.putrequest("POST", "/api/v1/forward_backward")
    connection.putheader("Content-Type", PROTOBUF)
    connection.putheader("Content-Length", str(200_000_000))
    connection.endheaders()
    piece = b"\x00" * 1_000_000
    try:
        for _ in range(200):
            connection.send(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return httpx.Response(answer.status, content=content, headers={"content-type": "application/json"})


def image_datum() -> tinker_pb2.Datum:
    message = good_datum()
    message.model_input.add().image.data = b"\x89PNG"
    return message


def odd_tokens() -> tinker_pb2.Datum:
    message = good_datum()
    message.model_input[0].encoded_text.tokens = b"\x01\x00\x00\x00\x02"
    return message


def sparse(crow: list[int], col: list[int]) -> tinker_pb2.Tensor:
    """An [8, 4] sparse weight tensor with the given indices."""
    parts = tinker_pb2.SparseCsr(
        values=np.ones(len(col), np.float32).tobytes(),
        crow_indices=np.asarray(crow, np.int64).tobytes(),
        col_indices=np.asarray(col, np.int64).tobytes(),
    )
    return tinker_pb2.Tensor(sparse_csr=parts, dtype=tinker_pb2.DTYPE_FLOAT32, shape=[8, 4])


def spans(sequence_id: str) -> tinker_pb2.Datum:
    message = datum(IDS, target_tokens=IDS, advantages=ONES)
    for spans in (message.model_input_spans, message.loss_fn_input_spans):
        span = spans.add().sampled_tokens
        span.sequence_id, span.offset, span.length = sequence_id, 0, 8
    return message


def nan_at(index: int, value: float = np.nan) -> np.ndarray:
    array = np.ones(8, np.float32)
    array[index] = value
    return array


def shaped(array: np.ndarray, *shape: int) -> tinker_pb2.Tensor:
    message = tensor(array)
    del message.shape[:]
    message.shape.extend(shape)
    return message


def reuse_seq(tenant: Tenant) -> httpx.Response:
    tenant.forward_backward([good_datum()])
    return tenant.post("save_weights", model_id=tenant.model_id, seq_id=tenant.seq_id, path="reused")


def long_ids(count: int) -> list[int]:
    return [1] * count


BIG = CONTEXT + 1
CASES: list[tuple[str, str, Send]] = [
    # sessions and models
    ("not json", "json|body", text("create_session", "{")),
    ("json array for an object", "body|object|dictionary", text("create_model", "[1, 2]")),
    ("create_model without session", "session_id", call("create_model", model_seq_id=0, base_model=BASE_MODEL)),
    ("foreign session", "session_id", model(session_id="someone-elses")),
    ("session id of a wrong type", "session_id", model(session_id=7)),
    ("model_seq_id as words", "model_seq_id", model(model_seq_id="first")),
    ("unknown base model", "base_model", model(base_model="meta/none")),
    ("rank as words", "rank", model(rank="four")),
    ("rank 0", "rank", model(rank=0)),
    ("negative rank", "rank", model(rank=-4)),
    ("rank above the maximum", "rank", model(rank=4096)),
    ("nothing to train", "train_", model(train_attn=False, train_mlp=False, train_unembed=False)),
    ("dimuon", "optimizer", model(optimizer_config={"type": "dimuon", "version": 1})),
    ("info of an unknown model", "model_id", call("get_info", model_id="nobody:train:0")),
    ("heartbeat of an unknown session", "session", call("session_heartbeat", session_id="nobody")),
    # optimizer
    ("step without parameters", "adam_params|optim", call("optim_step", model_id="$model", seq_id="$seq")),
    ("step of an unknown model", "model_id", call("optim_step", model_id="x:train:0", seq_id=1, adam_params={})),
    ("learning rate as words", "learning_rate", adam(learning_rate="fast")),
    (
        "learning rate NaN",
        "learning_rate|json",
        text("optim_step", '{"model_id": "$model", "seq_id": 70001, "adam_params": {"learning_rate": NaN}}'),
    ),
    ("negative learning rate", "learning_rate", adam(learning_rate=-1.0)),
    ("beta1 of 1.5", "beta1", adam(beta1=1.5)),
    ("beta2 of -1", "beta2", adam(beta2=-1.0)),
    ("negative eps", "eps", adam(eps=-1.0)),
    ("negative weight decay", "weight_decay", adam(weight_decay=-0.1)),
    ("negative clip", "grad_clip_norm", adam(grad_clip_norm=-1.0)),
    ("seq_id as words", "seq_id", call("optim_step", model_id="$model", seq_id="two", adam_params={})),
    ("seq_id reused for another kind", "seq_id", reuse_seq),
    # weights
    ("path traversal", "path|name", call("save_weights", model_id="$model", seq_id="$seq", path="../../etc/passwd")),
    ("two dots", "path|name", call("save_weights_for_sampler", model_id="$model", seq_id="$seq", path="..")),
    ("slash in a name", "path|name", call("save_weights", model_id="$model", seq_id="$seq", path="a/b")),
    ("empty name", "path|name", call("save_weights", model_id="$model", seq_id="$seq", path="")),
    ("NUL in a name", "path|name", call("save_weights", model_id="$model", seq_id="$seq", path="a\x00b")),
    ("ttl of 5 s", "ttl_seconds", call("save_weights", model_id="$model", seq_id="$seq", path="t", ttl_seconds=5)),
    (
        "load from no path",
        "path",
        call("load_weights", model_id="$model", seq_id="$seq", path="hello", optimizer=False),
    ),
    (
        "load what was never saved",
        "path",
        call("load_weights", model_id="$model", seq_id="$seq", path="tinker://x:train:0/weights/none", optimizer=False),
    ),
    (
        "load outside the folder",
        "path",
        call("load_weights", model_id="$model", seq_id="$seq", path="tinker://../weights/..", optimizer=False),
    ),
    ("weights_info of nothing", "path", call("weights_info", tinker_path="tinker://x:train:0/weights/none")),
    # training data
    ("garbage protobuf", "protobuf|body", body(lambda good: b"\xff\xfe\xfd" * 20)),
    ("truncated protobuf", "protobuf|body|data", body(lambda good: good[:-30])),
    ("empty body", "model_id|body|protobuf|data", body(lambda good: b"")),
    (
        "truncated zstd",
        "zstd|body",
        body(lambda good: zstandard.compress(good * 50)[:-20], content_encoding="zstd"),
    ),
    ("not zstd at all", "zstd|body", body(lambda good: good, content_encoding="zstd")),
    ("unknown encoding", "encoding", body(lambda good: good, content_encoding="snappy")),
    ("unknown content type", "content-type|content_type|json|body", body(lambda good: good, content_type="text/plain")),
    (
        "zstd bomb",
        "body|large|limit|bytes",
        body(lambda good: zstandard.compress(b"\x00" * 400_000_000), content_encoding="zstd"),
    ),
    ("200 MB body", "body|large|limit|bytes", huge_body),
    ("unknown model", "model_id", train(good_datum(), model_id="nobody:train:0")),
    ("no data", "data", train()),
    ("empty datum", "model_input", train(datum([], target_tokens=IDS[:0], weights=ONES[:0]))),
    ("second datum wrong", r"data[1]", train(good_datum(), datum(IDS, target_tokens=IDS, weights=ONES[:3]))),
    ("token beyond the vocabulary", "model_input", train(datum([1] * 7 + [70000], target_tokens=IDS, weights=ONES))),
    ("negative token", "model_input", train(datum([1] * 7 + [-1], target_tokens=IDS, weights=ONES))),
    ("half a token", "model_input", train(odd_tokens())),
    ("image", "image", train(image_datum())),
    (
        "longer than the context",
        "model_input",
        train(datum(long_ids(BIG), target_tokens=np.ones(BIG, np.int64), weights=np.ones(BIG, np.float32))),
    ),
    ("target beyond the vocabulary", "target_tokens", loss("cross_entropy", target_tokens=IDS + 5000, weights=ONES)),
    ("negative target", "target_tokens", loss("cross_entropy", target_tokens=IDS - 5, weights=ONES)),
    ("targets as floats", "target_tokens", loss("cross_entropy", target_tokens=ONES, weights=ONES)),
    ("no targets", "target_tokens", loss("cross_entropy", weights=ONES)),
    ("no weights", "weights", loss("cross_entropy", target_tokens=IDS)),
    ("wrong length", "target_tokens|weights", loss("cross_entropy", target_tokens=IDS[:5], weights=ONES[:5])),
    ("NaN weight", "weights", loss("cross_entropy", target_tokens=IDS, weights=nan_at(3))),
    ("infinite weight", "weights", loss("cross_entropy", target_tokens=IDS, weights=nan_at(3, np.inf))),
    ("bytes against shape", "weights", loss("cross_entropy", target_tokens=IDS, weights=shaped(ONES, 9))),
    ("negative shape", "weights", loss("cross_entropy", target_tokens=IDS, weights=shaped(ONES, -8))),
    ("sparse rows wrong", "weights", loss("cross_entropy", target_tokens=IDS, weights=sparse([0, 9], [0]))),
    ("sparse column wrong", "weights", loss("cross_entropy", target_tokens=IDS, weights=sparse([0] + [1] * 8, [77]))),
    ("unknown input", "colour", loss("cross_entropy", target_tokens=IDS, weights=ONES, colour=ONES)),
    ("unknown loss", "loss_fn", loss("hinge", target_tokens=IDS, weights=ONES)),
    ("unknown loss setting", "loss_fn_config.margin", loss("ppo", {"margin": 1.0}, **RL)),
    ("setting out of range", "clip_low_threshold", loss("ppo", {"clip_low_threshold": -3.0}, **RL)),
    ("setting NaN", "loss_fn_config.beta", loss("dro", {"beta": float("nan")}, **RL)),
    ("infinite advantage", "advantages", loss("ppo", **(RL | {"advantages": nan_at(1, -np.inf)}))),
    ("NaN logprob", "logprobs", loss("importance_sampling", **(RL | {"logprobs": nan_at(0)}))),
    ("2-D advantages", "advantages", loss("ppo", **(RL | {"advantages": np.ones((8, 2), np.float32)}))),
    ("unknown recording", "sequence_id|sequence", train(spans("no-such"), loss_fn="stable_reinforce")),
    # sampling
    (
        "session with nothing to sample",
        "base_model|model_path",
        call("create_sampling_session", session_id="$session", sampling_session_seq_id=50),
    ),
    (
        "sampler of an unknown session",
        "session_id",
        call("create_sampling_session", session_id="nobody", sampling_session_seq_id=0, base_model=BASE_MODEL),
    ),
    (
        "sampler of an unknown base model",
        "base_model",
        call("create_sampling_session", session_id="$session", sampling_session_seq_id=51, base_model="meta/none"),
    ),
    ("sampling with an unknown session", "sampling_session_id", sample(sampling_session_id="nobody:sample:0")),
    ("empty prompt", "prompt", sample(())),
    ("prompt without chunks", "prompt", sample(prompt={"chunks": []})),
    ("prompt as text", "prompt", sample(prompt="hello")),
    ("prompt token beyond the vocabulary", "prompt", sample((1, 70000))),
    ("negative prompt token", "prompt", sample((1, -2))),
    ("prompt token as words", "tokens|prompt", sample(("one",))),
    ("prompt longer than the context", "prompt", sample(long_ids(BIG))),
    ("image in a prompt", "image|prompt", chunk(type="image", data="iVBORw==", format="png")),
    ("unknown chunk", "chunk|prompt", chunk(type="smell", strength=3)),
    ("no samples", "num_samples", sample(num_samples=0)),
    ("half a sample", "num_samples", sample(num_samples=0.5)),
    ("no tokens", "max_tokens", sample(params={"max_tokens": 0})),
    ("negative temperature", "temperature", sample(params={"temperature": -1.0})),
    ("top_p 0", "top_p", sample(params={"top_p": 0.0})),
    ("top_p 1.5", "top_p", sample(params={"top_p": 1.5})),
    ("top_k 0", "top_k", sample(params={"top_k": 0})),
    ("top_k -2", "top_k", sample(params={"top_k": -2})),
    ("seed as words", "seed", sample(params={"seed": "lucky"})),
    ("seed past int64", "seed", sample(params={"seed": 2**70})),
    ("stops of two kinds", "stop", sample(params={"stop": ["a", 1]})),
    ("negative top-k of prompt logprobs", "topk_prompt_logprobs", sample(topk_prompt_logprobs=-1)),
    # futures and reading
    ("unknown future", "request_id", call("retrieve_future", request_id="123456789")),
    ("future that is no number", "request_id", call("retrieve_future", request_id="../../1")),
    ("future of a wrong type", "request_id", call("retrieve_future", request_id={"a": 1})),
    ("unknown sampler", "sampling_session_id|sampler_id", get("samplers/nobody:sample:0")),
    ("unknown run", "training_run|model_id|run", get("training_runs/nobody:train:0")),
    ("negative page", "limit|offset", get("training_runs?limit=-1")),
    ("unknown route", "not found", get("no_such_route")),
]


@pytest.fixture(scope="module")
def sender(server: Server) -> Iterator[Tenant]:
    with server.client() as http_client:
        tenant = Tenant(http_client)
        base_sampler(tenant)
        tenant.sample(tenant.sampler())
        yield tenant


class Bystander:
    """A tenant whose every number is compared with the same tenant's numbers when it was alone."""

    def __init__(self, http_client: httpx.Client) -> None:
        self.tenant = Tenant(http_client, rank=4, seed=11)
        self.sampler = self.tenant.sampler()

    def step(self, number: int) -> tuple[list[bytes], float, bytes]:
        data = [good_datum(8, seed=number), good_datum(20, seed=100 + number)]
        output = self.tenant.forward_backward(data)
        self.tenant.optim_step()
        drawn = self.tenant.sample(self.sampler, params={"max_tokens": 8, "seed": number})
        logprobs = [result.SerializeToString(deterministic=True) for result in output.loss_fn_outputs]
        return logprobs, output.metrics["loss:sum"], drawn.SerializeToString(deterministic=True)


EVERY = 12
"""The bystander takes a step after this many bad requests."""


@pytest.fixture(scope="module")
def bystander(server: Server) -> Iterator[Callable[[], None]]:
    with server.client() as http_client:
        alone = Bystander(http_client)
        expected = [alone.step(number) for number in range(len(CASES) // EVERY)]
        watched, taken = Bystander(http_client), 0

        def check() -> None:
            nonlocal taken
            assert watched.step(taken) == expected[taken]
            taken += 1

        yield check


def refusal(tenant: Tenant, response: httpx.Response) -> str:
    """What the server said about a bad request; fails if it accepted it."""
    if response.status_code == 200:
        answer = response.json()
        assert "request_id" in answer, f"accepted: {answer}"
        outcome = tenant.outcome(answer["request_id"])
        assert outcome.json is not None, "accepted"
        assert outcome.error, f"accepted: {outcome.json}"
        assert outcome.json["category"] == "user", outcome.json
        return outcome.error
    assert 400 <= response.status_code < 500, f"{response.status_code} {response.text}"
    assert response.status_code not in (408, 409, 429), "the SDK would retry for ever"
    detail = json.loads(response.content)["detail"]
    assert detail
    return detail if isinstance(detail, str) else json.dumps(detail)


@pytest.mark.parametrize(("words", "send"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused_by_name(
    request: pytest.FixtureRequest,
    server: Server,
    sender: Tenant,
    bystander: Callable[[], None],
    words: str,
    send: Send,
) -> None:
    said = refusal(sender, send(sender))
    assert any(word in said.lower() for word in words.lower().split("|")), said
    assert "Traceback" not in said
    index = [case[0] for case in CASES].index(request.node.callspec.id)
    if index % EVERY == EVERY - 1:
        bystander()


def test_the_sender_itself_still_trains(sender: Tenant) -> None:
    first = sender.forward_backward([good_datum()])
    sender.optim_step()
    second = sender.forward_backward([good_datum()])
    assert second.metrics["loss:sum"] < first.metrics["loss:sum"]
    assert np.isfinite(second.metrics["loss:sum"])


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 40
    assert len({case[0] for case in CASES}) == len(CASES)
