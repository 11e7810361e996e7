"""Bring lost models and ephemeral snapshots back, a little at a time, while everybody else's work goes on.

A rebuild is a generator: it restores the starting point that ``tx.tinker.recovery`` chose, hands the finished jobs to
the worker again, and yields whenever it has to wait for a micro-batch or for files to be read. The engine advances it
between slices.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from functools import partial

from sqlalchemy.engine import Engine as Database
from sqlmodel import select

from tx.errors import ModelLost, NotFound, TxError
from tx.tinker.checkpoints import BrokenCheckpoint
from tx.tinker.db import AWAY, Checkpoint, Job, RecoveryPoint, reading
from tx.tinker.jobs import JobTable
from tx.tinker.reads import when_read
from tx.tinker.recovery import Replay, plan_replay
from tx.tinker.recovery_points import RecoveryPoints
from tx.tinker.scheduler import COMMUTING
from tx.tinker.work import SnapshotNeed, Work
from tx.types import Finished, ModelState
from tx.worker.worker import Worker

log = logging.getLogger(__name__)


class Rebuilds:
    """The rebuilds under way. Keys are model ids and snapshot ids."""

    def __init__(self, db: Database, jobs: JobTable, worker: Worker, work: Work, points: RecoveryPoints) -> None:
        self._db = db
        self._jobs = jobs
        self._worker = worker
        self._work = work
        self._points = points
        self._damaged: set[str] = set()  # starting points that could not be read
        self._under_way: dict[str, Iterator[None]] = {}
        self._next_id = -1  # the worker's job ids below zero are replays: nobody is answered
        self._awaited: set[int] = set()
        self._finished: dict[int, Finished] = {}
        self.last_barrier: dict[str, int] = {}
        """By rebuilt model: the highest seq of a barrier that it has behind it."""

    def __contains__(self, key: str) -> bool:
        return key in self._under_way

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def begin_model(self, model_id: str) -> None:
        """Start to rebuild a model; raises what makes that impossible."""
        history = self._jobs.history(model_id)
        replay = self._plan(model_id, history)
        barriers = [job.seq_id for job in history if job.kind not in COMMUTING]
        self.last_barrier[model_id] = max((seq_id for seq_id in barriers if seq_id is not None), default=-1)
        self._under_way[model_id] = self._rebuild(replay, model_id, model_id)

    def begin_snapshot(self, need: SnapshotNeed) -> None:
        """Start to rebuild an ephemeral snapshot, on a model of its own that goes when it is taken."""
        replay = self._plan(need.model_id, self._jobs.history(need.model_id), need.request_id)
        self._under_way[need.snapshot_id] = self._rebuild_snapshot(replay, need)

    def take(self, finished: Finished) -> None:
        """A replayed micro-batch's outcome."""
        self._finished[finished.job_id] = finished

    def abort(self, error: Exception) -> None:
        """The worker broke: whatever was handed to it will not come back."""
        for job_id in self._awaited:
            self._finished[job_id] = Finished(job_id, error=error)

    def advance(self) -> dict[str, Exception | None]:
        """Go on with each until it has to wait; those that ended, with what failed them."""
        ended: dict[str, Exception | None] = {}
        for key, rebuild in list(self._under_way.items()):
            try:
                next(rebuild)
            except StopIteration:
                ended[key] = None
            except AWAY:
                raise
            except Exception as error:
                ended[key] = error if isinstance(error, TxError) else ModelLost(f"{key} can't be rebuilt: {error}")
                if not isinstance(error, TxError):
                    log.exception("rebuilding %s failed", key)
        for key in ended:
            del self._under_way[key]
        return ended

    def _plan(self, model_id: str, history: Sequence[Job], until: int | None = None) -> Replay:
        with reading(self._db) as session:
            checkpoints = session.exec(select(Checkpoint).where(Checkpoint.model_id == model_id)).all()
        starts: list[Checkpoint | RecoveryPoint] = [*checkpoints, *self._points.of(model_id)]
        readable = [start for start in starts if _key(start) not in self._damaged]
        return plan_replay(model_id, history, readable, until)

    def _rebuild(self, replay: Replay, model_id: str, target: str, until: int | None = None) -> Iterator[None]:
        try:
            replay = yield from self._restore_start(replay, model_id, target, until)
            yield from self._replay(replay, target, with_points=target == model_id)
        except BaseException:
            self._worker.drop_model(target)  # half a model must not look like a whole one
            raise
        log.info("rebuilt %s", target)

    def _restore_start(
        self, replay: Replay, model_id: str, target: str, until: int | None
    ) -> Generator[None, None, Replay]:
        """Put the newest state that can be read into ``target``; what is left to replay."""
        while True:
            log.info("rebuilding %s: %s jobs after %s", target, len(replay.jobs), _start_of(replay))
            start = replay.start
            if start is None:
                return replay
            try:
                state = yield from when_read(partial(self._read, start))
            except (BrokenCheckpoint, NotFound) as error:
                log.warning("%s can't be rebuilt from %s, so from an older state: %s", target, _start_of(replay), error)
                self._damaged.add(_key(start))
                replay = self._plan(model_id, self._jobs.history(model_id), until)
                continue
            self._worker.restore_model(target, state, with_optimizer=True)
            self._work.applied[target] = start.seq_id
            return replay

    def _read(self, start: Checkpoint | RecoveryPoint) -> ModelState:
        if isinstance(start, RecoveryPoint):
            return self._work.reads.take(_key(start), lambda: self._points.read(start))
        return self._work.read_state(start)

    def _replay(self, replay: Replay, target: str, *, with_points: bool) -> Iterator[None]:
        waiting: list[int] = []  # consecutive forward_backwards share micro-batches, as they did the first time
        for job in replay.jobs:
            if job.kind != "forward_backward":
                yield from self._wait(waiting)
            job_id, self._next_id = self._next_id, self._next_id - 1
            if (yield from when_read(partial(self._work.redo, job, target, job_id))):
                self._points.trained(target, job.tokens_in)
                self._awaited.add(job_id)
                waiting.append(job_id)
            elif with_points and job.kind == "optim_step":
                self._points.after_step(target, job.seq_id, replayed=True)
        yield from self._wait(waiting)

    def _rebuild_snapshot(self, replay: Replay, need: SnapshotNeed) -> Iterator[None]:
        target = f"{need.snapshot_id}#rebuild"
        try:
            yield from self._rebuild(replay, need.model_id, target, need.request_id)
            self._work.keep_rebuilt(need, target)
        finally:
            self._worker.drop_model(target)

    def _wait(self, waiting: list[int]) -> Iterator[None]:
        while waiting:
            finished = self._finished.pop(waiting[0], None)
            if finished is None:
                yield
                continue
            self._awaited.discard(waiting.pop(0))
            if finished.error is not None:
                raise ModelLost(f"a replayed job failed: {finished.error}") from finished.error


def _start_of(replay: Replay) -> str:
    if replay.start is None:
        return "its creation"
    if isinstance(replay.start, RecoveryPoint):
        return f"recovery point {replay.start.seq_id}"
    return f"checkpoint {replay.start.name}"


def _key(start: Checkpoint | RecoveryPoint) -> str:
    return f"{type(start).__name__} {start.model_id} {start.seq_id} {start.created_at!r}"
