"""Rebuilds let others go on, and leave nothing behind when they fail. Exactness is tested through the engine."""

from __future__ import annotations

import pytest

from tests.tinker.engine_bench import Bench, Client, body_of
from tx.errors import ModelLost
from tx.tinker.rebuild import Rebuilds


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_qwen3):
    folder = tmp_path_factory.mktemp("rebuild")
    bench = Bench(folder, f"sqlite:///{folder / 'tx.db'}", tiny_qwen3)
    client = Client(bench)
    bench.run(client.create(), client.train(lengths=(6,)), client.step(), client.train(lengths=(6,)))
    return bench


def rebuilds_of(bench) -> Rebuilds:
    engine = bench._new_engine()
    return Rebuilds(bench.db, bench.jobs, bench.worker, engine._work, bench.points)


def test_a_rebuild_waits_for_the_worker_without_holding_the_loop(bench):
    bench.worker.drop_model("sess-a:train:0")
    rebuilds = rebuilds_of(bench)
    rebuilds.begin_model("sess-a:train:0")
    assert rebuilds.last_barrier == {"sess-a:train:0": 2}
    assert rebuilds.advance() == {}
    assert rebuilds.advance() == {}, "it can't go on before the micro-batch is done"
    while rebuilds:
        for done in bench.worker.train_slice() if bench.worker.training else []:
            rebuilds.take(done)
        ended = rebuilds.advance()
    assert ended == {"sess-a:train:0": None}
    assert bench.worker.export_model("sess-a:train:0").step == 1


def test_a_rebuild_that_fails_leaves_no_half_model(bench):
    bench.worker.drop_model("sess-a:train:0")
    rebuilds = rebuilds_of(bench)
    rebuilds.begin_model("sess-a:train:0")
    while not bench.worker.has_model("sess-a:train:0"):  # a thread may read a recovery point first
        assert rebuilds.advance() == {}
    rebuilds.abort(RuntimeError("the worker broke"))
    (error,) = rebuilds.advance().values()
    assert isinstance(error, ModelLost)
    assert not bench.worker.has_model("sess-a:train:0")
    assert not rebuilds


def test_other_tenants_work_while_a_model_is_rebuilt(bench):
    bench.worker.drop_model("sess-a:train:0")
    mine, other = Client(bench, seq_id=3), Client(bench, "sess-b")
    jobs = bench.run(mine.step(), other.create(), other.train(lengths=(6,)))
    assert body_of(jobs[2])["metrics"]["loss:sum"] > 0
    assert jobs[2].finished_at > 0
    assert bench.worker.export_model("sess-a:train:0").step == 2
