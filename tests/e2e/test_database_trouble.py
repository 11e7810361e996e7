"""The database is slow, full, or drops its connections: a wait or a clear error, and then the server goes on."""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests import inject
from tests.support.server import Server
from tests.support.tenant import Outcome, Tenant, good_datum
from tx.tinker.wire import tinker_pb2

LIMIT_S = 60.0

SLOW_S = 0.1
"""What every statement takes."""

OTHERS_END = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
"""SQL that cuts every connection to this database but the one that says it."""


def wait(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def again(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """As the SDK does it: a request that got a 5xx is sent again."""
    deadline = time.monotonic() + LIMIT_S
    while (reply := ask()).status_code >= 500:
        assert reply.status_code == 503, reply.text
        assert time.monotonic() < deadline, reply.text
        time.sleep(0.05)
    return reply


class Patient(httpx.Client):
    """Its requests are retried as the SDK's are."""

    def request(self, *args: Any, **options: Any) -> httpx.Response:
        return again(lambda: super(Patient, self).request(*args, **options))


def patient(server: Server) -> Patient:
    return Patient(base_url=f"{server.url}/api/v1", headers={"X-API-Key": "tml-test"}, timeout=60)


def loss_of(outcome: Outcome) -> float:
    assert outcome.protobuf is not None, outcome.json
    return tinker_pb2.ForwardBackwardOutput.FromString(outcome.protobuf).metrics["loss:sum"]


def course(tenant: Tenant, trouble: Callable[[], None], rounds: int = 1) -> list[object]:
    """What a tenant is answered; ``trouble`` comes while he waits, in each round."""
    seen: list[object] = []
    base = tenant.sampler()
    for number in range(rounds):
        step = tenant.send(tenant.request([good_datum(8, seed=number), good_datum(25, seed=1)])).json()["request_id"]
        adam = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        optim = tenant.ok("optim_step", model_id=tenant.model_id, seq_id=tenant.next_seq(), adam_params=adam)
        body = tenant.sample_body(base, params={"seed": number, "max_tokens": 100})
        drawn = tenant.ok("asample", **body)["request_id"]
        trouble()
        seen.append(loss_of(tenant.outcome(step)))
        tenant.json(optim["request_id"])
        outcome = tenant.outcome(drawn)
        assert outcome.protobuf is not None, outcome.json
        response = tinker_pb2.SampleResponse.FromString(outcome.protobuf)
        seen.append([each.SerializeToString() for each in response.sequences])
    return seen


def test_connections_that_are_cut_again_and_again_fail_nothing(
    tiny_qwen3: Path, tmp_path: Path, postgres_url: str
) -> None:
    with (
        Server(tiny_qwen3, tmp_path, "--database-url", postgres_url) as server,
        patient(server) as http,
        psycopg.connect(postgres_url, autocommit=True) as hand,
    ):
        expected = course(Tenant(http, seed=5), lambda: None, rounds=2)
        num_cut = 0

        def cut() -> None:
            nonlocal num_cut
            for _ in range(3):
                num_cut += len(hand.execute(OTHERS_END).fetchall())
                time.sleep(0.05)

        assert course(Tenant(http, seed=5), cut, rounds=2) == expected
        assert num_cut >= 6
        # Who waits is woken, and needn't ask again: the threads that listen have lived on.
        wait(lambda: httpx.get(f"{server.url}/api/v1/healthz").status_code == 200, "the engine does not come back")
        tenant = Tenant(http, seed=6)
        sent = tenant.send(tenant.request([good_datum(8)])).json()["request_id"]
        accept = {"accept": "application/x-protobuf"}
        assert http.post("/retrieve_future", json={"request_id": sent}, headers=accept).status_code == 200


def test_a_full_disk_under_the_database_refuses_what_is_new_and_answers_what_is_there(
    tiny_qwen3: Path, tmp_path: Path
) -> None:
    with Server(tiny_qwen3, tmp_path) as server, server.client() as http:
        expected = course(Tenant(http, seed=5), lambda: None)
        tenant = Tenant(http, seed=5)
        answered = tenant.send(tenant.request([good_datum(12)], forward_only=True)).json()["request_id"]
        answer = tenant.outcome(answered).protobuf

        def room(num_bytes: int) -> None:
            """So far may files grow: from now on, of every process of this server."""
            for pid in server.pids():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

        def refused() -> None:
            room(0)
            try:
                reply = http.post("/asample", json=tenant.sample_body(tenant_sampler))
                assert reply.status_code == 503, reply.text
                assert "database" in reply.json()["detail"]
                assert tenant.outcome(answered).protobuf == answer
            finally:
                room(resource.RLIM_INFINITY)
            wait(lambda: http.get("/healthz").status_code == 200, "the engine does not come back")

        tenant_sampler = tenant.sampler()
        with patient(server) as http_:
            tenant.http = http_
            assert course(tenant, refused) == expected


@dataclass
class Troubled:
    """A server and the files that say what is wrong with its database."""

    server: Server
    folder: Path


@pytest.fixture
def troubled(tiny_qwen3: Path, tmp_path: Path) -> Iterator[Troubled]:
    files, data = tmp_path / "trouble", tmp_path / "server"
    files.mkdir()
    data.mkdir()
    with Server(tiny_qwen3, data, variables=inject.environment_for_troubles(files)) as server:
        yield Troubled(server, files)


def test_a_slow_database_only_takes_longer(troubled: Troubled) -> None:
    with troubled.server.client() as http:
        expected = course(Tenant(http, seed=5), lambda: None)
        tenant = Tenant(http, seed=5)
        (troubled.folder / "slow").write_text(str(SLOW_S))
        seen = course(tenant, lambda: None)
        assert http.get("/healthz").json()["status"] == "ok"
        (troubled.folder / "slow").unlink()
        assert seen == expected


@contextlib.contextmanager
def read_only_sqlite(troubled: Troubled) -> Iterator[None]:
    (troubled.folder / "read-only").touch()
    yield
    (troubled.folder / "read-only").unlink()


@contextlib.contextmanager
def read_only_postgresql(hand: psycopg.Connection) -> Iterator[None]:
    """As after a failover to a standby: connections end, and new ones can only read; later new ones can write again."""
    database = hand.info.dbname
    hand.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    hand.execute(OTHERS_END)
    yield
    hand.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_read_only_database_answers_what_is_there_and_refuses_the_rest(
    request: pytest.FixtureRequest, tiny_qwen3: Path, tmp_path: Path, database: str
) -> None:
    with contextlib.ExitStack() as stack:
        if database == "sqlite":
            troubled: Troubled = request.getfixturevalue("troubled")
            server, read_only = troubled.server, functools.partial(read_only_sqlite, troubled)
        else:
            url = request.getfixturevalue("postgres_url")
            server = stack.enter_context(Server(tiny_qwen3, tmp_path, "--database-url", url))
            hand = stack.enter_context(psycopg.connect(url, autocommit=True))
            read_only = functools.partial(read_only_postgresql, hand)
        http, patiently = stack.enter_context(server.client()), stack.enter_context(patient(server))
        expected = course(Tenant(http, seed=5), lambda: None)
        tenant = Tenant(patiently, seed=5)
        answered = tenant.send(tenant.request([good_datum(12)], forward_only=True)).json()["request_id"]
        answer = tenant.outcome(answered).protobuf
        sampler = tenant.sampler()

        def refused() -> None:
            with read_only():
                session = {"tags": [], "sdk_version": "0.38.0"}
                for route, body in (("asample", tenant.sample_body(sampler)), ("create_session", session)):
                    reply = http.post(f"/{route}", json=body)
                    assert reply.status_code == 503, f"{route}: {reply.text}"
                    assert "database" in reply.json()["detail"]
                assert tenant.outcome(answered).protobuf == answer
            wait(lambda: http.get("/healthz").status_code == 200, "the engine does not come back")

        assert course(tenant, refused) == expected
