"""The replay plan: right starting point, right jobs, right order."""

from __future__ import annotations

import pytest

from tx.errors import ModelLost, NotFound
from tx.tinker.db import Checkpoint, Job
from tx.tinker.recovery import plan_replay

MODEL = "s:train:0"


def job(request_id: int, seq_id: int | None, kind: str, payload: bytes | None = b"{}") -> Job:
    return Job(
        request_id=request_id, kind=kind, base_model="b", model_id=MODEL, seq_id=seq_id, payload=payload,
        status="done", created_at=0.0,
    )  # fmt: skip


def checkpoint(seq_id: int | None, kind: str = "weights", has_optimizer: bool = True, created_at: float = 0.0):
    return Checkpoint(
        model_id=MODEL, kind=kind, name=f"c{seq_id}", folder="f", size_bytes=1, created_at=created_at, seq_id=seq_id,
        has_optimizer=has_optimizer,
    )  # fmt: skip


def kinds(*names: str) -> list[Job]:
    return [job(i + 1, i, name) for i, name in enumerate(names)]


HISTORY = kinds("create_model", "forward_backward", "optim_step", "forward_backward", "save_weights", "optim_step")


def seqs(replay) -> list[int | None]:
    return [job.seq_id for job in replay.jobs]


def test_without_checkpoints_everything_is_replayed_but_saves():
    replay = plan_replay(MODEL, HISTORY, [])
    assert (replay.start, seqs(replay)) == (None, [0, 1, 2, 3, 5])


def test_c11_gradients_waiting_at_a_save_are_replayed_after_it():
    replay = plan_replay(MODEL, HISTORY, [checkpoint(2)])
    assert replay.start is not None
    assert seqs(replay) == [3, 5]


def test_the_newest_whole_checkpoint_wins():
    rows = [checkpoint(2), checkpoint(5, has_optimizer=False), checkpoint(5, kind="sampler_weights"), checkpoint(None)]
    assert plan_replay(MODEL, HISTORY, rows).start is rows[0]


def test_a_load_makes_everything_before_it_irrelevant():
    history = [*HISTORY, job(7, 6, "load_weights"), job(8, 7, "forward_backward")]
    replay = plan_replay(MODEL, history, [checkpoint(2), checkpoint(5)])
    assert (replay.start, seqs(replay)) == (None, [6, 7])


def test_a_model_that_was_saved_before_its_first_step_starts_from_there():
    """Its creation may have been pruned by then."""
    history = [job(1, 0, "create_model", payload=None), job(2, 1, "forward_backward")]
    replay = plan_replay(MODEL, history, [checkpoint(0)])
    assert replay.start.seq_id == 0
    assert seqs(replay) == [1]


def test_chunks_are_replayed_in_seq_order_whatever_the_arrival():
    history = [job(1, 0, "create_model"), job(2, 2, "forward_backward"), job(3, 1, "forward_backward")]
    assert seqs(plan_replay(MODEL, history[::-1], [])) == [0, 1, 2]


def test_forward_and_failed_jobs_have_no_effect():
    assert seqs(plan_replay(MODEL, kinds("create_model", "forward", "optim_step"), [])) == [0, 2]


def test_a_snapshot_is_rebuilt_from_what_came_before_its_save():
    replay = plan_replay(MODEL, HISTORY, [checkpoint(2), checkpoint(5)], until=5)
    assert replay.start.seq_id == 2
    assert seqs(replay) == [3]


def test_jobs_without_seq_ids_are_replayed_from_the_start():
    history = [job(1, 0, "create_model"), job(2, None, "forward_backward"), job(3, None, "optim_step")]
    replay = plan_replay(MODEL, history, [checkpoint(1)])
    assert replay.start is None
    assert [done.request_id for done in replay.jobs] == [1, 2, 3]


def test_what_cannot_be_rebuilt_is_said():
    with pytest.raises(NotFound, match="created"):
        plan_replay(MODEL, [], [])
    with pytest.raises(NotFound, match="unloaded"):
        plan_replay(MODEL, [*HISTORY, job(7, None, "unload_model")], [])
    pruned = [*HISTORY[:3], job(4, 3, "forward_backward", payload=None)]
    with pytest.raises(ModelLost, match=r"\[4\] have been pruned"):
        plan_replay(MODEL, pruned, [])
    with pytest.raises(NotFound):
        plan_replay(MODEL, HISTORY, [], until=99)
