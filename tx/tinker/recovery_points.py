"""Recovery points: a model's whole state on disk, written now and then, so that a crash costs seconds of replay.

A point is taken right after an ``optim_step`` has committed or been replayed, where no gradients wait, and only once
the model has trained for so long that taking and writing it cost at most ``SHARE`` (``REPLAY_SHARE``) of that time. The
copy is made on the engine's thread, the file by another; the row that makes it count is committed when the file is on
the disk. The ``KEPT`` newest of a model stay: an ephemeral snapshot may need the one before the last, and so does
whoever finds the last one damaged.

Unlike checkpoints they hold arrays as they are (no change of format, so they come back bit for bit), belong to nobody,
and go when the model's session has finished, or has been silent for ``SILENT_S``.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete
from sqlalchemy.engine import Engine as Database
from sqlmodel import col, or_, select

from tx.errors import StorageError
from tx.tinker import model_files
from tx.tinker.checkpoints import BrokenCheckpoint, CheckpointCard, CheckpointFolders
from tx.tinker.db import Model, RecoveryPoint, Session, now, reading, writing
from tx.tinker.wire.paths import TinkerPath
from tx.types import ModelState

log = logging.getLogger(__name__)

SHARE = 0.05
"""Of a model's training time, what its points may cost."""

REPLAY_SHARE = 0.5
"""Of a replay's time. Who has crashed may crash again, and a replay that is cut off without a point was for nothing."""

MIN_TRAINED_S = 2.0
"""Less training than this is not worth a point: to replay it takes no longer."""

KEPT = 2
SILENT_S = 7 * 86400.0

_RECENT_S = 60.0
"""Of training, from which the time that a token takes is known."""

_MAX_WRITING = 2
_FIRST_BYTES_PER_S = 200e6
"""What writing is taken to cost before it has been measured."""


@dataclass
class _Tally:
    """What is known of one model."""

    tokens: int = 0  # trained since its last point
    cost_s: float | None = None  # of its last point


@dataclass(frozen=True)
class _Writing:
    row: RecoveryPoint
    copied_s: float
    future: Future[tuple[int, float]]  # bytes, seconds


class RecoveryPoints:
    """The points of one engine's models. Driven by the engine's one thread.

    Args:
        folder: of this base model's engine alone; made when needed. What has no row is deleted now.
        export: a host copy of a model.
        clock: seconds, to measure costs by.
    """

    def __init__(
        self,
        db: Database,
        folder: Path,
        base_model: str,
        export: Callable[[str], ModelState],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._db = db
        self._folder = folder
        self._folders = CheckpointFolders(folder)
        self._base_model = base_model
        self._export = export
        self._clock = clock
        self._tallies: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._seconds, self._tokens = 0.0, 0.0  # of recent training, for the time that a token takes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="point")
        self._writing: dict[str, _Writing] = {}
        self._sweep()

    def computed(self, seconds: float) -> None:
        """Training took so long just now."""
        self._seconds += seconds
        if self._seconds > _RECENT_S:  # both at once: a slice may end many jobs, and a job may take many slices
            self._seconds, self._tokens = self._seconds / 2, self._tokens / 2

    def trained(self, model_id: str, num_tokens: int) -> None:
        """A ``forward_backward`` of so many tokens has run, for the first time or in a replay."""
        self._tokens += num_tokens
        self._tallies[model_id].tokens += num_tokens

    def after_step(self, model_id: str, seq_id: int | None, *, replayed: bool = False) -> bool:
        """Take a point if it is time; the model's job ``seq_id``, an ``optim_step``, has just run and is committed."""
        tally = self._tallies[model_id]
        trained_s = tally.tokens * self._seconds / max(1.0, self._tokens)
        if seq_id is None or model_id in self._writing or len(self._writing) >= _MAX_WRITING:
            return False
        share = REPLAY_SHARE if replayed else SHARE
        if trained_s < max(MIN_TRAINED_S, (tally.cost_s or 0.0) / share):
            return False
        started = self._clock()
        try:
            state = self._export(model_id)
        except Exception:  # the step has its answer: the model only stays without this point
            log.warning("no recovery point of %s", model_id, exc_info=True)
            return False
        if tally.cost_s is None:
            num_bytes = sum(array.nbytes for tree in (state.weights, state.mu, state.nu) for array in tree.values())
            tally.cost_s = num_bytes / _FIRST_BYTES_PER_S
            if trained_s < tally.cost_s / share:
                return False
        tally.tokens = 0
        row = RecoveryPoint(
            model_id=model_id, seq_id=seq_id, base_model=self._base_model, size_bytes=0, created_at=now()
        )
        copied_s = self._clock() - started
        self._writing[model_id] = _Writing(row, copied_s, self._writer.submit(self._write, row, state))
        return True

    def collect(self) -> None:
        """Make the points count whose files are written, and let go of those that they make superfluous."""
        for model_id, writing_point in list(self._writing.items()):
            if not writing_point.future.done():
                continue
            del self._writing[model_id]
            tally, row = self._tallies[model_id], writing_point.row
            try:
                row.size_bytes, written_s = writing_point.future.result()
            except StorageError as error:  # a full disk: the model goes on from its older point
                log.warning("no recovery point of %s: %s", model_id, error)
                continue
            tally.cost_s = writing_point.copied_s + written_s
            log.debug(
                "recovery point %d of %s: copied in %.3f s, written in %.3f s",
                row.seq_id, model_id, writing_point.copied_s, written_s,
            )  # fmt: skip
            with writing(self._db) as session:
                session.merge(row)
                query = select(RecoveryPoint).where(RecoveryPoint.model_id == model_id)
                points = session.exec(query.order_by(col(RecoveryPoint.seq_id).desc())).all()
                for old in points[KEPT:]:
                    session.delete(old)
            self._remove(points[KEPT:])

    def of(self, model_id: str) -> list[RecoveryPoint]:
        """Those of a model that can be restored, unless their files have been damaged."""
        with reading(self._db) as session:
            return list(session.exec(select(RecoveryPoint).where(RecoveryPoint.model_id == model_id)).all())

    def read(self, point: RecoveryPoint) -> ModelState:
        """The state; raises NotFound or BrokenCheckpoint."""
        try:
            card, files = self._folders.read(_path(point))
        except StorageError as error:
            raise BrokenCheckpoint(str(error)) from error
        return model_files.from_point(card, files)

    def prune(self, silent_before: float) -> None:
        """Delete the points of models that no request can reach any more, or whose client fell silent before then."""
        over = or_(col(Session.finished_at).is_not(None), col(Session.heartbeat_at) < silent_before)
        query = (
            select(RecoveryPoint)
            .join(Model, col(Model.model_id) == col(RecoveryPoint.model_id))
            .join(Session, col(Session.session_id) == col(Model.session_id))
            .where(RecoveryPoint.base_model == self._base_model, over)
        )
        with reading(self._db) as session:
            gone = session.exec(query).all()
        self.delete({point.model_id for point in gone})

    def delete(self, model_ids: Collection[str]) -> None:
        """Delete all points of these models, rows first."""
        for model_id in model_ids:
            points = self.of(model_id)
            with writing(self._db) as session:
                session.exec(delete(RecoveryPoint).where(col(RecoveryPoint.model_id) == model_id))
            self._remove(points)
            self._tallies.pop(model_id, None)

    def close(self) -> None:
        """Stop writing; what isn't written is not needed."""
        self._writer.shutdown(wait=False, cancel_futures=True)

    def _remove(self, points: Iterable[RecoveryPoint]) -> None:
        """Delete files whose rows are gone."""
        for point in points:
            try:
                self._folders.delete(_path(point))
            except StorageError as error:  # only wasted space, until the next start
                log.warning("the files of an old recovery point remain: %s", error)

    def _write(self, row: RecoveryPoint, state: ModelState) -> tuple[int, float]:
        started = self._clock()
        card = CheckpointCard(self._base_model, state.lora, state.step, row.created_at)
        size = self._folders.write(_path(row), card, model_files.to_point(state))
        return size, self._clock() - started

    def _sweep(self) -> None:
        with reading(self._db) as session:
            rows = session.exec(select(RecoveryPoint).where(RecoveryPoint.base_model == self._base_model)).all()
        known = {self._folder / _path(row).folder for row in rows}
        for folder in self._folder.glob("*/*/*"):
            if folder not in known:
                shutil.rmtree(folder, ignore_errors=True)


def _path(point: RecoveryPoint) -> TinkerPath:
    return TinkerPath(point.model_id, "weights", str(point.seq_id))
