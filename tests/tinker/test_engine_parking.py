"""More models than the device holds, through the engine: idle ones leave it, lost ones are rebuilt, nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.tinker.engine_bench import BASE, Bench, Client
from tx.tinker.db import Session, now, writing
from tx.tinker.sessions import EXPIRED_AFTER_S, Sessions
from tx.worker import parking
from tx.worker.worker import Worker

TENANTS = ("sess-a", "sess-b", "sess-c", "sess-d")
LONG = (45, 45)
"""Lengths of a request that is too long to run beside those of other models: its numbers don't depend on them."""


@pytest.fixture(scope="module")
def parking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parked")


@pytest.fixture(scope="module")
def worker(tiny_qwen3: Path, parking_folder: Path) -> Worker:
    """Two places on the device, and a byte of host memory: parked models are in files."""
    return Worker(
        tiny_qwen3, BASE, dtype="float32", max_lora_adapters=2, max_lora_rank=8, parked_adapters_memory=1,
        parking_folder=parking_folder,
    )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, sqlite_url: str, tiny_qwen3: Path, worker: Worker) -> Iterator[Bench]:
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker)
    yield bench
    for session_id in (*TENANTS, "alone"):
        worker.drop_model(f"{session_id}:train:0")


def add_session(bench: Bench, session_id: str, silent_s: float = 0.0) -> None:
    with writing(bench.db) as db:
        db.add(Session(session_id=session_id, created_at=now() - silent_s, heartbeat_at=now() - silent_s))


def keep_house(bench: Bench) -> None:
    bench.engine._next_housekeeping = 0.0
    bench.engine.step()


def state_of(bench: Bench, client: Client) -> np.ndarray:
    """Every number of a model, its bits comparable."""
    state = bench.worker.export_model(client.model_id)
    return np.concatenate([part[name].ravel() for part in (state.weights, state.mu, state.nu) for name in sorted(part)])


def train_alone(bench: Bench, seeds: tuple[int, ...]) -> np.ndarray:
    """What a model comes to that takes a step after each of these batches, without neighbours."""
    client = Client(bench, "alone")
    bench.run(client.create(), *(verb for seed in seeds for verb in (client.train(seed, LONG), client.step())))
    return state_of(bench, client)


def test_models_of_expired_and_finished_sessions_leave_the_device_and_go_on_as_if_nothing_had_been(bench, worker):
    keep_house(bench)  # the next time is when this test says so
    expired, finished = Client(bench, "sess-a"), Client(bench, "sess-b")
    add_session(bench, "sess-a", silent_s=EXPIRED_AFTER_S + 1)
    add_session(bench, "sess-b")
    bench.run(expired.create(), expired.train(1, LONG), expired.step(), expired.train(2, LONG), finished.create())
    assert set(worker.resident_models) == {expired.model_id, finished.model_id}
    keep_house(bench)
    assert worker.resident_models == (finished.model_id,)
    Sessions(bench.db).finish("sess-b", "success", None)
    keep_house(bench)
    assert worker.resident_models == ()
    assert all(worker.has_model(client.model_id) for client in (expired, finished))
    bench.run(expired.step(), expired.train(3, LONG), expired.step())  # the step finds the gradients that waited
    np.testing.assert_array_equal(state_of(bench, expired), train_alone(bench, (1, 2, 3)))


def test_an_idle_model_that_has_work_stays_where_it_is(bench, worker):
    keep_house(bench)
    client = Client(bench, "sess-a")
    add_session(bench, "sess-a", silent_s=EXPIRED_AFTER_S + 1)
    bench.run(client.create())
    trained = [client.train(seed, LONG) for seed in range(12)]
    keep_house(bench)  # one micro-batch of three
    assert not bench.jobs.finished_ids(trained)
    assert worker.resident_models == (client.model_id,)
    assert [job.status for job in bench.run(*trained)] == ["done"] * 12


def test_more_tenants_than_places_come_to_what_each_would_alone(bench, worker, parking_folder):
    clients = [Client(bench, session_id) for session_id in TENANTS]
    bench.run(*(client.create() for client in clients))
    verbs = (lambda client, seed: client.train(seed, LONG), lambda client, _: client.step())
    bench.run(*(verb(client, seed) for seed in (1, 2, 3) for verb in verbs for client in clients))
    assert len(worker.resident_models) == len(list(parking_folder.iterdir())) == 2
    wanted = train_alone(bench, (1, 2, 3))
    for client in clients:
        np.testing.assert_array_equal(state_of(bench, client), wanted)


@pytest.mark.parametrize("first", ["step", "train", "train together", "save"])
def test_a_model_whose_file_is_lost_is_rebuilt_before_its_jobs_go_on(bench, worker, parking_folder, first, monkeypatch):
    """Whatever finds out: a step, a micro-batch of one model or of several, an export. Each job has its effect once."""
    monkeypatch.setattr(parking, "REST_AFTER_FAILURE_S", 0.0)
    clients = [Client(bench, session_id) for session_id in TENANTS]
    bench.run(*(client.create() for client in clients))
    bench.run(*(verb for client in clients for verb in (client.train(1, LONG), client.step(), client.train(2, LONG))))
    files = list(parking_folder.iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(b"\0" * file.stat().st_size)
    jobs = []
    if first == "save":
        jobs += [client.do("save_weights", path="ck") for client in clients]
    if first.startswith("train"):
        # Alone they are several micro-batches: when the first finds the model lost, the worker still holds the others.
        lengths, seeds = ((3, 4), (3, 4)) if first == "train together" else (LONG, range(10, 22))
        jobs += [client.train(seed, lengths) for seed in seeds for client in clients]
    jobs += [verb for client in clients for verb in (client.step(), client.train(5, LONG), client.step())]
    finished = bench.run(*jobs)
    assert [job.status for job in finished] == ["done"] * len(jobs), [job.error for job in finished]
    # Where requests run together, who is there changes the order of sums; a gradient too many shows at 1e-2.
    tolerance = 1e-5 if first == "train together" else 0.0
    states = [state_of(bench, client) for client in clients]
    for state in states[:-1]:
        np.testing.assert_allclose(state, states[-1], rtol=tolerance, atol=tolerance)
    if not first.startswith("train"):
        np.testing.assert_array_equal(states[0], train_alone(bench, (1, 2, 5)))
