"""When a recovery point is taken, what it brings back, and when it goes."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.tinker.engine_bench import BASE, Bench, Client, body_of, new_worker
from tx.tinker.checkpoint_rows import CheckpointRows
from tx.tinker.db import RecoveryPoint, Session, now, writing
from tx.tinker.pruning import prune
from tx.tinker.recovery_points import KEPT, MIN_TRAINED_S, SHARE, SILENT_S, RecoveryPoints
from tx.tinker.uptime import Uptime
from tx.types import LoraConfig, ModelState

HOUR_S = 3600.0

HOURS_OF_TOKENS = 10**9
"""Put into a model's tally, its next step is worth a point."""


@pytest.fixture
def bench(tmp_path, database_url, tiny_qwen3):
    bench = Bench(tmp_path, database_url, tiny_qwen3)
    yield bench
    bench.close()


def state_of(bench, client) -> ModelState:
    return bench.worker.export_model(client.model_id)


def assert_equal(a: ModelState, b: ModelState):
    assert (a.lora, a.step) == (b.lora, b.step)
    for tree, other in ((a.weights, b.weights), (a.mu, b.mu), (a.nu, b.nu)):
        assert tree.keys() == other.keys()
        for name, array in tree.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name, strict=True)


def step_with_point(bench, client, seed: int) -> RecoveryPoint:
    """One training step after which a point is on the disk."""
    jobs = bench.run(client.train(seed))
    bench.points._tallies[client.model_id].tokens = HOURS_OF_TOKENS
    (job,) = bench.run(client.step())
    bench.points._seconds = 0.0  # what there was of it is long past: no more points from here on
    body_of(jobs[0]), body_of(job)
    while not any(point.seq_id == client.seq_id for point in bench.points.of(client.model_id)):
        bench.engine.step()
        bench.pace.wait(0.005)
    return next(point for point in bench.points.of(client.model_id) if point.seq_id == client.seq_id)


def replayed(bench, caplog) -> list[str]:
    return [r.message for r in caplog.records if r.message.startswith("rebuilding")]


def test_a_crash_replays_only_what_came_after_the_point_and_gives_the_same_bits(bench, caplog):
    client = Client(bench)
    bench.run(client.create())
    step_with_point(bench, client, 1)
    bench.run(client.train(2), client.step(), client.train(3))
    bench.run(client.step())
    expected = state_of(bench, client)

    bench.restart()
    with caplog.at_level(logging.INFO):
        # A forward of no consequence brings the model back.
        body_of(bench.run(client.train(4, forward_only=True))[0])
    assert replayed(bench, caplog) == [f"rebuilding {client.model_id}: 4 jobs after recovery point 2"]
    assert_equal(state_of(bench, client), expected)


def test_an_ephemeral_snapshot_comes_back_from_the_point_before_it(bench, caplog):
    client = Client(bench)
    bench.run(client.create())
    step_with_point(bench, client, 1)
    bench.run(client.train(2), client.step())
    save, sampler = client.snapshot()
    bench.run(save)
    (before,) = bench.run(client.sample(sampler, [5, 6, 7]))
    step_with_point(bench, client, 3)

    bench.restart()
    with caplog.at_level(logging.INFO):
        (after,) = bench.run(client.sample(sampler, [5, 6, 7]))
    assert [text.partition(": ")[2] for text in replayed(bench, caplog)] == ["2 jobs after recovery point 2"]
    assert after.result == before.result


def test_replays_that_are_cut_off_again_and_again_come_to_an_end(bench, caplog, monkeypatch):
    client = Client(bench)
    bench.run(client.create())
    with monkeypatch.context() as patch:
        patch.setattr("tx.tinker.recovery_points.MIN_TRAINED_S", float("inf"))  # no points, however long it takes
        for seed in range(4):
            bench.run(client.train(seed), client.step())
    expected = state_of(bench, client)

    def newest() -> int:
        return max((point.seq_id for point in bench.points.of(client.model_id)), default=0)

    def crash_once_there_is_a_point() -> int:
        bench.restart()
        bench.points.computed(HOUR_S)  # as if replaying took so long
        waits, known = client.train(9, forward_only=True), newest()
        while not bench.points._writing and newest() == known:
            if not bench.engine.step():
                bench.pace.wait(0.005)  # the last point is being read
            assert bench.jobs.get(waits).status != "done", "rebuilt without a point"
        for point in bench.points._writing.values():
            point.future.result()
        bench.points.collect()
        return newest()

    assert [crash_once_there_is_a_point() for _ in range(3)] == [2, 4, 6]
    bench.restart()
    with caplog.at_level(logging.INFO):
        bench.run(client.train(10, forward_only=True))
    assert replayed(bench, caplog) == [f"rebuilding {client.model_id}: 2 jobs after recovery point 6"]
    assert_equal(state_of(bench, client), expected)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_from_a_damaged_point_the_older_one_is_taken(bench, caplog, damage):
    client = Client(bench)
    bench.run(client.create())
    step_with_point(bench, client, 1)
    newest = step_with_point(bench, client, 2)
    expected = state_of(bench, client)
    (file,) = bench.points_folder.glob(f"*/*/{newest.seq_id}/state.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    bench.restart()
    with caplog.at_level(logging.INFO):
        bench.run(client.train(4, forward_only=True))
    assert [text.partition(" after ")[2] for text in replayed(bench, caplog)] == [
        "recovery point 4",
        "recovery point 2",
    ]
    assert_equal(state_of(bench, client), expected)


def test_only_the_newest_stay(bench):
    client = Client(bench)
    bench.run(client.create())
    for seed in range(KEPT + 2):
        step_with_point(bench, client, seed)
    kept = sorted(point.seq_id for point in bench.points.of(client.model_id))
    assert kept == [2 * step for step in range(3, KEPT + 3)]
    assert sorted(int(folder.name) for folder in bench.points_folder.glob("*/*/*")) == kept


def test_points_of_finished_and_of_long_silent_sessions_go(bench):
    clients = [Client(bench, f"sess-{name}") for name in "abc"]
    for client in clients:
        bench.run(client.create())
        step_with_point(bench, client, 1)
    with writing(bench.db) as db:
        for client, finished, heartbeat in zip(
            clients, (now(), None, None), (now(), now() - SILENT_S - 1, now() - SILENT_S + 600), strict=True
        ):
            db.add(
                Session(session_id=client.session_id, created_at=now(), heartbeat_at=heartbeat, finished_at=finished)
            )
    bench.points.prune(now() - SILENT_S)
    assert [len(bench.points.of(client.model_id)) for client in clients] == [0, 0, 1]
    assert [folder.name for folder in bench.points_folder.glob("*") if any(folder.glob("*/*"))] == ["sess-c:train:0"]


def test_a_folder_that_a_crash_left_without_a_row_goes_at_the_next_start(bench):
    client = Client(bench)
    bench.run(client.create())
    kept = step_with_point(bench, client, 1)
    orphan = bench.points_folder / client.model_id / "weights" / "999"
    orphan.mkdir()
    bench.restart()
    assert not orphan.exists()
    assert_equal(bench.points.read(kept), bench.points.read(kept))


def test_a_disk_that_takes_no_point_costs_no_step(bench):
    client = Client(bench)
    bench.run(client.create(), client.train(1))
    bench.points_folder.mkdir(exist_ok=True)
    (bench.points_folder / client.model_id).write_text("a file where the folder should be")
    bench.points._tallies[client.model_id].tokens = HOURS_OF_TOKENS
    assert body_of(bench.run(client.step())[0])["metrics"]
    body_of(bench.run(client.train(2))[0])
    assert bench.points.of(client.model_id) == []


class Costs:
    """Points whose copy takes a fixed time on a clock that only the copy moves."""

    def __init__(self, tmp_path, bench, copy_s: float) -> None:
        self.time = 0.0
        self.copy_s = copy_s
        self.exports = 0
        self.points = RecoveryPoints(bench.db, tmp_path / "costs", BASE, self.export, clock=lambda: self.time)

    def export(self, _model_id: str) -> ModelState:
        self.exports += 1
        self.time += self.copy_s
        zeros = {"layers.0.q_proj.lora_A": np.zeros((2, 2), np.float32)}
        return ModelState(LoraConfig(rank=2, seed=0), zeros, zeros, zeros, 1)

    def train(self, seconds: float) -> bool:
        """Train 100 tokens in so many seconds, then step; whether a point was taken."""
        self.seq_id = getattr(self, "seq_id", 0) + 1
        self.points.computed(seconds)
        self.points.trained("m", 100)
        taken = self.points.after_step("m", self.seq_id)
        while self.points._writing:
            self.points.collect()
        return taken


def test_points_cost_no_more_than_their_share_of_the_training_time(tmp_path, bench):
    costs = Costs(tmp_path, bench, copy_s=1.0)
    step_s = 5.0
    taken = [costs.train(step_s) for _ in range(200)]
    assert 0 < sum(taken) * costs.copy_s <= SHARE * 200 * step_s
    assert sum(taken) * costs.copy_s > 0.8 * SHARE * 200 * step_s, "and are as fresh as that allows"
    assert costs.exports == sum(taken)


@pytest.mark.parametrize(("slices", "models"), [(1, 16), (8, 1)])
def test_nor_when_models_train_together_or_a_request_takes_many_slices(tmp_path, bench, slices, models):
    """16 tiny tenants in one slice have trained for a sixteenth of it each; a large batch for all of its slices."""
    costs = Costs(tmp_path, bench, copy_s=0.5)
    steps, slice_s, taken = 500, 1.0, -models  # of each one's first, the cost isn't known before
    for seq_id in range(steps):
        for _ in range(slices - 1):
            costs.points.computed(slice_s)
        for model in range(models):
            costs.points.trained(f"m{model}", 16)
        costs.points.computed(slice_s)
        for model in range(models):
            taken += costs.points.after_step(f"m{model}", seq_id)
            while costs.points._writing:
                costs.points.collect()
    share = taken * costs.copy_s / (steps * slices * slice_s)
    assert 0.5 * SHARE < share <= SHARE


def test_little_training_is_not_worth_a_point(tmp_path, bench):
    costs = Costs(tmp_path, bench, copy_s=0.0)
    assert not costs.train(0.4 * MIN_TRAINED_S)
    assert not costs.train(0.4 * MIN_TRAINED_S)
    assert costs.train(0.4 * MIN_TRAINED_S)


def test_moe_states_come_back_bit_for_bit(tmp_path, database_url, tiny_qwen3_moe):
    bench = Bench(tmp_path, database_url, tiny_qwen3_moe, worker=new_worker(tiny_qwen3_moe))
    client = Client(bench, rank=6)
    bench.run(client.create())
    point = step_with_point(bench, client, 1)
    assert_equal(bench.points.read(point), state_of(bench, client))
    bench.close()


@pytest.mark.parametrize("goes", ["deleted", "expired"])
def test_a_model_comes_back_without_the_checkpoint_that_it_was_saved_to(bench, goes, monkeypatch):
    """Its owner may have let it go after its old payloads were pruned."""
    monkeypatch.setattr("tx.tinker.recovery_points.MIN_TRAINED_S", float("inf"))  # it has trained for too short a time
    client = Client(bench)
    bench.run(client.create(), client.train(1))
    body_of(bench.run(client.step())[0])
    body_of(bench.run(client.do("save_weights", path="only"))[0])
    body_of(bench.run(client.train(2), client.step())[1])
    expected = state_of(bench, client)
    prune(bench.db, now() + HOUR_S)
    rows = CheckpointRows(bench.db)
    if goes == "deleted":
        gone = rows.delete(client.model_id, "weights/only")
        bench.folders.delete(gone.folder)
    else:
        rows.set_ttl(client.model_id, "weights/only", 1.0)
        (gone,) = CheckpointRows(bench.db, clock=lambda: now() + HOUR_S).expire()
        bench.folders.delete(gone.folder)

    bench.restart()
    body_of(bench.run(client.train(3, forward_only=True))[0])
    assert_equal(state_of(bench, client), expected)


def test_a_leap_of_the_clock_takes_no_point_of_a_session_that_has_not_been_silent(bench):
    wall, steady = [now()], [0.0]
    client = Client(bench)
    bench.run(client.create())
    step_with_point(bench, client, 1)
    with writing(bench.db) as db:
        db.add(Session(session_id=client.session_id, created_at=wall[0], heartbeat_at=wall[0]))
    bench.engine._ages = Uptime(clock=lambda: wall[0], steady=lambda: steady[0])

    def points_after_housekeeping(leap_s: float, passes_s: float) -> int:
        wall[0] += leap_s + passes_s
        steady[0] += passes_s
        bench.engine._next_housekeeping = 0.0
        bench.engine.step()
        return len(bench.points.of(client.model_id))

    assert points_after_housekeeping(9 * 86400.0, 0.0) == 1
    assert points_after_housekeeping(0.0, SILENT_S - 60) == 1
    assert points_after_housekeeping(-9 * 86400.0, 0.0) == 1
    assert points_after_housekeeping(9 * 86400.0, 0.0) == 1
    assert points_after_housekeeping(0.0, SILENT_S + 60) == 0, "it has been now"
