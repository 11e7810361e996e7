"""An engine whose checkpoints are in an object store: slow or failing, it harms only who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore
from sqlmodel import select

from tests.support.object_stores import WatchedStore
from tests.tinker.engine_bench import Bench, Client, body_of, new_worker
from tx.tinker.db import Checkpoint, reading
from tx.tinker.wire.paths import parse_path
from tx.tinker.writes import MAX_WRITES
from tx.utils.object_storage import ObjectStorage
from tx.worker.worker import Worker

PROMPT = [5, 17, 900, 3]
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def worker(tiny_qwen3: Path) -> Worker:
    return new_worker(tiny_qwen3)


class Gate:
    """Holds or fails the operations of a store whose name and path contain what it is told."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.storage = ObjectStorage(WatchedStore(self.store, self._before), "s3://bucket")
        self._open = threading.Event()
        self._open.set()
        self._operation, self._part, self._error = "", "", False

    def hold(self, operation: str, part: str = "") -> None:
        self._operation, self._part = operation, part
        self._open.clear()

    def fail(self, operation: str, part: str = "") -> None:
        self._operation, self._part, self._error = operation, part, True

    def release(self) -> None:
        self._operation, self._error = "", False
        self._open.set()

    def _before(self, operation: str, path: object) -> None:
        if operation == self._operation and self._part in str(path):
            if self._error:
                raise GenericError("no route to host")
            assert self._open.wait(LIMIT_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.release()


@pytest.fixture
def bench(tmp_path: Path, sqlite_url: str, tiny_qwen3: Path, worker: Worker, gate: Gate) -> Iterator[Bench]:
    bench = Bench(tmp_path, sqlite_url, tiny_qwen3, worker)
    bench.use_storage(gate.storage)
    yield bench
    gate.release()
    for model_id in worker.resident_models:
        worker.drop_model(model_id)
    bench.close()


@pytest.fixture
def two(bench: Bench) -> tuple[Client, Client]:
    """Two tenants with a model each, one step in."""
    clients = Client(bench), Client(bench, "sess-b")
    bench.run(*(request for one in clients for request in (one.create(), one.train(lengths=(6,)), one.step())))
    return clients


def loss(job) -> float:
    return body_of(job)["metrics"]["loss:sum"]


def status(bench: Bench, *request_ids: int) -> set[str]:
    return {bench.jobs.get(request_id).status for request_id in request_ids}


def test_a_save_that_fails_says_why_and_a_later_one_works(bench, two, gate):
    one, _ = two
    gate.fail("put", ".safetensors")
    failed, trained = bench.run(one.do("save_weights", path="ck"), one.train(lengths=(6,)))
    assert (failed.status, failed.category) == ("failed", "server")
    assert failed.error == "s3://bucket can't be written: no route to host"
    assert trained.status == "done"
    gate.release()
    (saved,) = bench.run(one.do("save_weights", path="ck"))
    assert body_of(saved)["path"] == "tinker://sess-a:train:0/weights/ck"
    assert bench.folders.card(parse_path("tinker://sess-a:train:0/weights/ck")).step == 1
    assert bench.folders.sweep() == 0, "the failed one left nothing"


def test_a_slow_save_holds_up_nobody_and_not_even_its_own_training(bench, two, gate):
    one, other = two
    gate.hold("put", "sess-a")
    slow = one.do("save_weights", path="ck")
    jobs = bench.run(one.train(lengths=(6,)), one.step(), other.train(lengths=(6,)), other.do("save_weights", path="x"))
    assert [job.status for job in jobs] == ["done"] * 4
    assert status(bench, slow) == {"running"}
    gate.release()
    assert bench.run(slow)[0].status == "done"
    assert bench.folders.card(parse_path("tinker://sess-a:train:0/weights/ck")).step == 1, "as it was when asked"


def test_saves_do_not_pile_up_without_bound(bench, two, gate):
    one, other = two
    gate.hold("put", "sess-a")
    saves = [one.do("save_weights", path=f"ck{number}") for number in range(MAX_WRITES + 3)]
    bench.run(other.train(lengths=(6,)), other.step())
    assert len(bench.engine._work.writes) == MAX_WRITES
    waiting = other.do("save_weights", path="mine")
    behind = one.train(lengths=(6,))
    save, sampler = other.snapshot()
    bench.run(other.sample(other.sampler(), PROMPT))
    assert len(bench.engine._work.writes) == MAX_WRITES
    assert status(bench, *saves, waiting, behind, save) <= {"running", "pending"}
    gate.release()
    done = bench.run(*saves, waiting, behind, save, other.sample(sampler, PROMPT))
    assert {job.status for job in done} == {"done"}


def test_saves_of_one_name_are_written_in_order(bench, two, gate):
    one, _ = two
    gate.hold("put", "weights/ck")
    first = one.do("save_weights", path="ck")
    bench.run(one.train(lengths=(6,)), one.step())
    second = one.do("save_weights", path="ck", overwrite=True)
    third = one.do("save_weights", path="ck")
    gate.release()
    jobs = bench.run(first, second, third)
    assert [job.status for job in jobs] == ["done", "done", "failed"]
    assert "overwrite" in jobs[2].error
    with reading(bench.db) as db:
        (row,) = db.exec(select(Checkpoint)).all()
    assert bench.folders.card(row.folder).step == 2
    assert bench.folders.sweep() == 0


@pytest.mark.parametrize("replaying", [False, True])
def test_a_slow_load_holds_up_its_own_model_alone(bench, two, gate, replaying):
    """A load, or a lost model that comes back from its checkpoint."""
    one, other = two
    (saved,) = bench.run(one.do("save_weights", path="ck"))
    straight = bench.run(one.train(lengths=(6,), seed=3), one.step(), one.train(lengths=(6,), seed=4))
    gate.hold("get_range", "sess-a")
    if replaying:
        bench.worker.drop_model(one.model_id)
        resumed = one.train(lengths=(6,), seed=4)
        slow = [resumed]
    else:
        slow = [one.do("load_weights", path=body_of(saved)["path"], optimizer=True)]
        slow += [one.train(lengths=(6,), seed=3), one.step(), one.train(lengths=(6,), seed=4)]
        resumed = slow[-1]
    done = bench.run(other.train(lengths=(6,)), other.step(), other.sample(other.sampler(), PROMPT))
    assert {job.status for job in done} == {"done"}
    assert status(bench, *slow) == {"running"}
    gate.release()
    assert {job.status for job in bench.run(*slow)} == {"done"}
    if not replaying:
        assert loss(bench.jobs.get(resumed)) == loss(straight[2])
    assert bench.worker.export_model(one.model_id).step == 2


def test_a_sample_that_waits_for_its_checkpoint_holds_up_no_other_and_can_be_cancelled(bench, two, gate):
    one, other = two
    (saved,) = bench.run(one.do("save_weights_for_sampler", path="s"))
    path = body_of(saved)["path"]
    expected = bench.run(one.sample(None, PROMPT, model_path=path))[0]
    for snapshot_id in list(bench.engine._work._snapshots):
        bench.worker.drop_snapshot(snapshot_id)
    gate.hold("get_range", "sess-a")
    slow, cancelled = one.sample(None, PROMPT, model_path=path), one.sample(None, PROMPT, model_path=path)
    base = other.sampler()
    bench.run(other.sample(base, PROMPT))
    bench.jobs.cancel(cancelled)
    bench.run(other.sample(base, PROMPT))
    assert status(bench, slow) == {"running"}
    gate.release()
    assert body_of(bench.run(slow)[0])["sequences"] == body_of(expected)["sequences"]


def test_a_load_that_fails_says_why_and_a_later_one_works(bench, two, gate):
    one, _ = two
    (saved,) = bench.run(one.do("save_weights", path="ck"))
    path = body_of(saved)["path"]
    gate.fail("get_range")
    failed, trained = bench.run(one.do("load_weights", path=path, optimizer=True), one.train(lengths=(6,)))
    assert (failed.status, failed.category) == ("failed", "server")
    assert failed.error == "s3://bucket can't be read: no route to host"
    assert trained.status == "done", "the model is as it was"
    gate.release()
    assert bench.run(one.do("load_weights", path=path, optimizer=True))[0].status == "done"
