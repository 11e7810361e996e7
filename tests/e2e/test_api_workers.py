"""Several API processes on one port and one database, on SQLite and PostgreSQL: a worker's death is nobody's loss."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.e2e.test_processes import STOP_LIMIT_S, wait_gone
from tests.e2e.test_two_tenants import example
from tests.support.server import BASE_MODEL, Server
from tests.support.tenant import Tenant, good_datum

NUM_WORKERS = 3


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tiny_qwen3: Path, tmp_path_factory) -> Iterator[Server]:
    """A server with three API workers."""
    flags = []
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres_server")
        name = f"tx_{uuid.uuid4().hex[:12]}"
        postgres.psql(f"CREATE DATABASE {name}")
        flags = ["--database-url", postgres.get_uri(name)]
    folder = tmp_path_factory.mktemp("workers")
    with Server(tiny_qwen3, folder, "--api-workers", str(NUM_WORKERS), *flags) as running:
        yield running


def worker_pids(server: Server) -> dict[int, int]:
    """By number, the process ids of the API workers."""
    found = {}
    for pid in server.pids():
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"TX_API_WORKER="):
                found[int(entry.partition(b"=")[2])] = pid
    return found


def engine_pid(server: Server) -> int:
    (pid,) = set(server.engine_pids()) - set(worker_pids(server).values())
    return pid


def number_of(http: httpx.Client) -> int:
    """The worker at the other end of this client's one connection."""
    text = http.get("/metrics").text
    return int(text.partition('api_worker="')[2].partition('"')[0])


class ToEach(ExitStack):
    """One client per worker, each on one connection."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.clients: dict[int, httpx.Client] = {}
        deadline = time.monotonic() + 120
        while len(self.clients) < NUM_WORKERS:
            assert time.monotonic() < deadline, f"only the workers {set(self.clients)} take connections"
            http = self.enter_context(server.client(limits=httpx.Limits(max_connections=1)))
            self.clients.setdefault(number_of(http), http)


def test_a_retry_finds_the_first_row_on_any_worker(server):
    with ToEach(server) as each:
        one, *others = each.clients.values()
        tenant = Tenant(one)
        body = tenant.request([good_datum(8)]).SerializeToString()
        first = tenant.send(body).json()["request_id"]
        for other in others:
            tenant.http = other
            assert tenant.send(body).json()["request_id"] == first
            assert tenant.outcome(first).protobuf is not None
        sampler = tenant.sampler()
        ask = tenant.sample_body(sampler, params={"max_tokens": 3, "seed": 1})
        assert len({http.post("/asample", json=ask).json()["request_id"] for http in each.clients.values()}) == 1


def test_the_same_creation_at_once_on_all_workers_makes_one(server):
    with ToEach(server) as each, ThreadPoolExecutor(4 * NUM_WORKERS) as pool:
        clients = list(each.clients.values())

        def everywhere(endpoint: str, body: dict, **headers: str) -> list[dict]:
            together = threading.Barrier(NUM_WORKERS)

            def ask(http: httpx.Client) -> dict:
                together.wait()
                reply = http.post(f"/{endpoint}", json=body, headers=headers)
                assert reply.status_code == 200, reply.text
                return reply.json()

            return list(pool.map(ask, clients))

        for attempt in range(5):
            session = {"tags": [], "sdk_version": "0.38.0"}
            made = everywhere("create_session", session, **{"x-idempotency-key": f"{uuid.uuid4()}"})
            (session_id,) = {reply["session_id"] for reply in made}
            model = {"session_id": session_id, "model_seq_id": 0, "base_model": BASE_MODEL}
            model["lora_config"] = {"rank": 4, "seed": attempt}
            assert len({reply["request_id"] for reply in everywhere("create_model", model)}) == 1
            sampler = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": BASE_MODEL}
            made = everywhere("create_sampling_session", sampler)
            assert len({reply["sampling_session_id"] for reply in made}) == 1


def test_every_worker_tells_the_truth_about_the_engine(server):
    with ToEach(server) as each:
        assert {http.get("/healthz").status_code for http in each.clients.values()} == {200}
        dead = engine_pid(server)
        os.kill(dead, signal.SIGKILL)
        seen: dict[int, set[str]] = {number: set() for number in each.clients}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            states = {number: http.get("/healthz").json()["status"] for number, http in each.clients.items()}
            for number, state in states.items():
                seen[number].add(state)
            if set(states.values()) == {"ok"} and all(seen[number] - {"ok"} for number in seen):
                break
            time.sleep(0.01)
        assert all(states <= {"ok", "starting", "recovering"} and len(states) > 1 for states in seen.values()), seen
        assert engine_pid(server) != dead


def test_clients_go_on_when_workers_die(server):
    """Each worker is killed in turn under a training and sampling SDK client, which ends as if nothing had happened."""
    data = [example(1, 9), example(2, 30)]

    def losses(training: tinker.TrainingClient, steps: Iterator[int]) -> Iterator[float]:
        for _ in steps:
            pass_ = training.forward_backward(data, "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=5e-3)).result()
            yield pass_.result().metrics["loss:sum"]

    with tinker.ServiceClient(base_url=server.url) as client:
        calm = client.create_lora_training_client(BASE_MODEL, rank=4, seed=5).result()
        expected = list(losses(calm, range(6)))
        training = client.create_lora_training_client(BASE_MODEL, rank=4, seed=5).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=20, seed=3)
        prompt = types.ModelInput.from_ints([1, 2, 3])
        stream = losses(training, itertools.repeat(0, 6))
        found = [next(stream)]
        for number in range(1, NUM_WORKERS + 1):
            waiting = [sampler.sample(prompt, num_samples=2, sampling_params=params) for _ in range(12)]
            dead = worker_pids(server)[number]
            os.kill(dead, signal.SIGKILL)
            found.append(next(stream))
            answers = [future.result(timeout=120) for future in waiting]
            assert len({tuple(sequence.tokens) for answer in answers for sequence in answer.sequences}) == 2
            deadline = time.monotonic() + 120
            while worker_pids(server).get(number) in (None, dead):
                assert time.monotonic() < deadline, "the worker was not started again"
                time.sleep(0.05)
        found += stream
    assert found == expected
    assert "Traceback" not in server.log.read_text()


def test_all_processes_stop_together(tiny_qwen3, tmp_path):
    with Server(tiny_qwen3, tmp_path, "--api-workers", str(NUM_WORKERS)) as server:
        assert sorted(worker_pids(server)) == [1, 2, 3]
        server.interrupt()
        assert wait_gone(server, STOP_LIMIT_S) == []
        assert server.process.wait() in (0, 130)
        assert "Traceback" not in server.log.read_text()
        server.start()
        assert len(server.pids()) == NUM_WORKERS + 2
        server.kill_api()
        assert wait_gone(server, STOP_LIMIT_S) == []
