"""The engine: the process that computes. ``python -m tx.tinker.engine`` with the flags of ``tx.tinker.config``.

The life of a job:

1. The API appended it; the change signal wakes us.
2. ``JobTable.claim`` marks it running; it waits here, in memory.
3. ``scheduler.plan`` says when it may start: its model's order, its sampler's snapshot, its tenant's turn.
4. A lost model or snapshot is rebuilt first (``Rebuilds``); the job waits, the others don't.
5. ``Work.start`` runs its handler. A barrier (step, load, save) acts at once; rows of ``forward_backward`` and
   ``sample`` go to the worker.
6. The loop gives the worker one training micro-batch, then decode slices for as long as that took, in turn.
7. What a slice finished is encoded and committed at once; the commit wakes the API, which hands the bytes out.
   Checkpoint files are written by threads meanwhile, and their job commits when they are in storage; threads read
   what a load or a sample needs. Jobs that wait for files hold up their own model alone.
8. Whatever a job raises fails that job alone: category "user" for InvalidInput, else "server". Only a job whose model
   turns out to be lost starts again, once, behind the model's rebuild.

A database that is away fails nothing: commits are tried for a while, then the process ends, and starts again when the
database is back. A job that was there when engines died is tried alone, and fails when that has gone on for too long.

A sample that is cancelled meanwhile is dropped wherever it stands, and its slots go to the next. After a crash the jobs
that were running are claimed again, and models come back on their first job. It serves no HTTP.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from sqlalchemy.engine import Engine as Database

from tx.errors import InvalidInput, ModelLost, StartupError, TxError
from tx.tinker import startup, uptime
from tx.tinker.checkpoints import CheckpointFolders
from tx.tinker.config import fail, parse_args
from tx.tinker.db import AWAY, Job
from tx.tinker.endings import Endings
from tx.tinker.in_flight import InFlight
from tx.tinker.jobs import JOB_KINDS, JobTable, Outcome
from tx.tinker.notify import ChangeSignal
from tx.tinker.reads import StillReading
from tx.tinker.rebuild import Rebuilds
from tx.tinker.recovery_points import SILENT_S, RecoveryPoints
from tx.tinker.scheduler import COMMUTING, SAMPLE, JobHeader, plan
from tx.tinker.sessions import EXPIRED_AFTER_S, Sessions
from tx.tinker.supervisor import say_ready, was_killed
from tx.tinker.uptime import Uptime
from tx.tinker.wire.paths import KIND_OF_SAVE
from tx.tinker.work import Work, made_sampler
from tx.tinker.writes import Writing
from tx.types import Finished
from tx.utils import log as log_setup
from tx.utils.garbage import collect_seldom
from tx.worker.worker import Worker

log = logging.getLogger(__name__)

MAX_WAITING_SAMPLES = 256
MAX_WAITING_TRAINING = 256
"""Claimed jobs kept in memory per sort: enough to plan with, while a flood of one sort can't lock the other out."""

ALONE_AFTER = 2
MAX_ATTEMPTS = 6
"""A job that was with the worker when so many engines died runs alone, and then fails. Others are not to blame."""

SELF_SUFFICIENT = frozenset({"create_model", "load_weights", "unload_model"})
"""Kinds that don't need their model's present state."""

MARK_STARTED_EVERY_S = 1.0
HOUSEKEEPING_EVERY_S = 60.0
_IDLE_WAIT_S = 0.25
_FILES_WAIT_S = 0.005

_A_WRITE = "a write"
"""Blocks saves until any of the writes under way has ended."""

_SAMPLING_KINDS = (SAMPLE,)
_OTHER_KINDS = tuple(kind for kind in JOB_KINDS if kind != SAMPLE)


class Engine:
    """The loop and what it holds. One thread drives it: ``run``, or ``step`` by step in tests.

    Args:
        sample_room: how many sequences the worker is given at the same time; the others wait here or in the table.
        ages: what is judged old by (default: by how long this object has been there).
        clock: seconds, to share the device by.
    """

    def __init__(
        self,
        db: Database,
        signal: ChangeSignal,
        worker: Worker,
        folders: CheckpointFolders,
        points: RecoveryPoints,
        in_flight: InFlight,
        base_model: str,
        *,
        sample_room: int,
        ages: Uptime | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._db = db
        self._signal = signal
        self._worker = worker
        self._folders = folders
        self._base_model = base_model
        self._sample_room = sample_room
        self._clock = clock
        self._jobs = JobTable(db, signal)
        self._sessions = Sessions(db)
        self._ages = Uptime() if ages is None else ages
        self._work = Work(db, worker, folders, base_model, self._ages)
        self._points = points
        self._in_flight = in_flight
        self._endings = Endings(self._jobs, self._work)
        self._rebuilds = Rebuilds(db, self._jobs, worker, self._work, points)
        self._waiting: dict[int, tuple[JobHeader, Job]] = {}
        self._running: dict[int, tuple[JobHeader, Job]] = {}  # handed to the worker
        self._blocked: dict[int, str] = {}  # waiting jobs, by the rebuild, read or write that they wait for
        self._started_again: set[int] = set()  # jobs whose model was lost under them
        self._last_barrier: dict[str, int] = {}
        self._sampling_credit_s = 0.0  # device time that sampling may use before training's next turn
        self._unmarked: list[int] = []  # samples that started and whose rows don't say so yet
        self._next_mark = 0.0
        self._look = True  # something may be pending in the table
        self._replan = False
        self._next_housekeeping = 0.0

    def run(self, stopping: Callable[[], bool]) -> None:
        """Work until told to stop; what is unfinished then goes back to the table."""
        requeued = self._jobs.requeue(self._base_model, self._in_flight.suspects)
        if requeued:
            log.info("%d jobs of the previous engine start again", requeued)
        self._jobs.take_cancelled(self._base_model)  # that engine had them; nobody has them now
        try:
            while not stopping():
                if not self.step():
                    self._wait()
        except AWAY:
            self._in_flight.set(())  # none of them has killed us
            raise
        self._work.writes.close()
        self._points.close()
        self._jobs.requeue(self._base_model)
        self._in_flight.close()

    def step(self) -> bool:
        """One round of the loop; False if there was nothing to do."""
        self._claim()
        self._advance_rebuilds()
        self._unblock_read()
        self._start_ready()
        worked = self._compute()
        self._collect_writes()
        self._keep_house()
        return worked or self._replan or (bool(self._rebuilds) and not self._work.reads)

    def _wait(self) -> None:
        with self._worker.idle():
            self._look |= self._signal.wait(_FILES_WAIT_S if self._work.writes or self._work.reads else _IDLE_WAIT_S)

    # ---- 2: claim ---------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        if not (self._look or self._signal.wait(0.0)):
            return
        for request_id in self._jobs.take_cancelled(self._base_model):
            self._let_go(request_id)
        num_samples = sum(header.is_sample for header, _ in self._waiting.values())
        sample_room = MAX_WAITING_SAMPLES - num_samples
        if sample_room < MAX_WAITING_SAMPLES // 4:
            sample_room = 0  # sharing a long queue between sessions looks at all of it: not for every single one
        rooms = (
            (_OTHER_KINDS, MAX_WAITING_TRAINING - (len(self._waiting) - num_samples)),
            (_SAMPLING_KINDS, sample_room),
        )
        self._look = False
        for kinds, room in rooms:
            in_turn = kinds == _SAMPLING_KINDS
            claimed = self._jobs.claim(self._base_model, room, kinds, in_turn=in_turn) if room > 0 else []
            for job in claimed:
                self._admit(job)
            self._look |= len(claimed) >= room  # there may be more: look again without being woken

    def _admit(self, job: Job) -> None:
        request_id = job.request_id or 0
        if job.attempts >= MAX_ATTEMPTS:
            self._endings.fail(
                job, TxError(f"The engine died {job.attempts} times while it had this {job.kind}; given up.")
            )
            return
        try:
            sampler_id = job.sampler_id if job.kind == SAMPLE else made_sampler(job)
            header = JobHeader(
                request_id, job.kind, job.session_id, job.model_id, job.seq_id, sampler_id, max(1, job.num_sequences)
            )
        except InvalidInput as error:
            self._endings.fail(job, error)
            return
        self._waiting[request_id] = header, job
        self._replan = True

    def _let_go(self, request_id: int) -> None:
        """Forget a sample that was cancelled in the table, wherever it stands; its room goes to others."""
        self._blocked.pop(request_id, None)
        held = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if held is not None:
            self._worker.cancel_sample(request_id)
            self._work.forget(held[1])
            self._replan = True

    # ---- 3: plan, 5: start ------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        while self._replan:  # a barrier that acted at once lets what is behind it go
            self._replan = False
            decision = plan(
                [header for header, _ in self._waiting.values() if not self._is_blocked_sample(header)],
                [header for header, _ in self._running.values()],
                sample_room=self._sample_room - self._num_sampling(),
                last_barrier=self._last_barrier,
            )
            for header in decision.late:
                _, job = self._waiting.pop(header.request_id)
                barrier = self._last_barrier.get(header.model_id or "")
                self._endings.fail(
                    job, InvalidInput("seq_id", header.seq_id, f"above {barrier}, which has already run")
                )
            startable = [header for header in decision.start if header.request_id not in self._blocked]
            for header in self._suspect_first(startable):
                self._start(header)

    def _suspect_first(self, startable: list[JobHeader]) -> list[JobHeader]:
        """All of these, unless one of them may have killed engines: then that one, when nothing else runs."""
        if any(job.attempts >= ALONE_AFTER for _, job in self._running.values()):
            return []
        suspects = [header for header in startable if self._waiting[header.request_id][1].attempts >= ALONE_AFTER]
        if not suspects:
            return startable
        return [] if self._running else suspects[:1]

    def _num_sampling(self) -> int:
        return sum(header.num_sequences for header, _ in self._running.values() if header.is_sample)

    def _is_blocked_sample(self, header: JobHeader) -> bool:
        """Blocked samples take no turns of others; blocked jobs of a model stay, to hold what is behind them."""
        return header.is_sample and header.request_id in self._blocked

    def _start(self, header: JobHeader) -> None:
        _, job = self._waiting[header.request_id]
        try:
            missing = self._missing(job)
            if missing is not None:
                self._blocked[header.request_id] = missing
                return
            self._in_flight.set([*self._running, header.request_id])
            outcome = self._work.start(job)
        except StillReading as reading:
            self._blocked[header.request_id] = reading.key
            return
        except AWAY:
            raise
        except Exception as error:
            del self._waiting[header.request_id]
            if not self._starts_again(header, job, error):
                self._endings.fail(job, error)
                self._passed(header)
            return
        del self._waiting[header.request_id]
        if outcome is None:
            self._running[header.request_id] = header, job
            if header.is_sample:
                self._unmarked.append(header.request_id)
            return
        if isinstance(outcome, Writing):
            self._work.writes.begin(job, outcome)
        else:
            self._endings.commit([outcome])
            if job.kind == "optim_step":
                self._points.after_step(job.model_id or "", job.seq_id)
        self._passed(header)

    def _passed(self, header: JobHeader) -> None:
        """The job's effect on its model is over, so what waits behind it may start."""
        self._replan = True
        self._started_again.discard(header.request_id)
        if header.is_barrier and header.model_id is not None and header.seq_id is not None:
            last = self._last_barrier.get(header.model_id, -1)
            self._last_barrier[header.model_id] = max(last, header.seq_id)

    # ---- 4: rebuild -------------------------------------------------------------------------------------------

    def _missing(self, job: Job) -> str | None:
        """What a job has to wait for, a rebuild (begun if need be) or a write; None if it can start."""
        if job.kind == SAMPLE:
            need = self._work.snapshot_need(job)
            if need is None or self._work.load_snapshot(need):
                return None
            if need.snapshot_id not in self._rebuilds:
                self._rebuilds.begin_snapshot(need)
            return need.snapshot_id
        writes = job.kind in KIND_OF_SAVE and made_sampler(job) is None
        if writes and self._work.must_wait_to_write(job):
            return _A_WRITE
        model_id = job.model_id or ""
        if model_id not in self._rebuilds:
            if job.kind in SELF_SUFFICIENT or self._worker.has_model(model_id):
                return None
            self._take_back(model_id)
            self._rebuilds.begin_model(model_id)
        return model_id

    def _take_back(self, model_id: str) -> None:
        """What the worker still has of a lost model must not run on the half that is rebuilt: it waits again."""
        self._worker.drop_model(model_id)
        for request_id, (header, _) in list(self._running.items()):
            if header.model_id == model_id and not header.is_sample:
                self._waiting[request_id] = self._running.pop(request_id)

    def _starts_again(self, header: JobHeader, job: Job, error: Exception) -> bool:
        """A job that found its model lost had no effect: it waits for the rebuild, unless it has done so before."""
        if not isinstance(error, ModelLost) or header.is_sample or header.request_id in self._started_again:
            return False
        log.info("%s %s starts again: %s", job.kind, job.request_id, error)
        self._started_again.add(header.request_id)
        self._waiting[header.request_id] = header, job
        self._replan = True
        return True

    def _advance_rebuilds(self) -> None:
        for key, error in self._rebuilds.advance().items():
            barrier = self._rebuilds.last_barrier.pop(key, -1)
            self._last_barrier[key] = max(self._last_barrier.get(key, -1), barrier)
            for request_id in self._unblock(key):
                if error is not None:
                    _, job = self._waiting.pop(request_id)
                    self._endings.fail(job, error)

    def _unblock_read(self) -> None:
        if self._work.reads:
            for key in {key for key in self._blocked.values() if self._work.reads.is_done(key)}:
                self._unblock(key)

    def _unblock(self, key: str) -> list[int]:
        """The jobs that waited for ``key``; they may be planned again."""
        freed = [request_id for request_id, blocker in self._blocked.items() if blocker == key]
        for request_id in freed:
            del self._blocked[request_id]
        self._replan = True
        return freed

    # ---- 6: compute, 7: commit --------------------------------------------------------------------------------

    def _compute(self) -> bool:
        """One unit of device work. Sampling gets as much device time as the last micro-batch took, then training goes.

        So a short sample that arrives during a micro-batch is usually done before the next one starts, and a flood of
        samples leaves training half of the device.
        """
        started = self._clock()
        trains = self._worker.training and not (self._worker.sampling and self._sampling_credit_s > 0)
        gather_s = self._worker.gather_s if trains else 0.0
        if gather_s > 0 and not self._worker.sampling:
            self._look |= self._signal.wait(gather_s)
            return True
        if trains and gather_s <= 0:
            self._deliver(self._slice(self._worker.train_slice, COMMUTING))
            self._sampling_credit_s = self._clock() - started
            self._points.computed(self._sampling_credit_s)
            return True
        if self._worker.sampling:
            self._deliver(self._slice(self._worker.sample_slice, frozenset({SAMPLE})))
            self._sampling_credit_s -= self._clock() - started
            return True
        return False

    def _slice(self, run: Callable[[], list[Finished]], kinds: frozenset[str]) -> list[Finished]:
        """One slice; if the worker itself breaks, the jobs of that sort that it holds fail and the engine goes on."""
        try:
            return run()
        except Exception as error:
            held = [header for header, _ in self._running.values() if header.kind in kinds]
            log.exception("the worker broke; %d jobs fail", len(held))
            for header in held:
                if header.is_sample:
                    self._worker.cancel_sample(header.request_id)
                elif header.model_id is not None:
                    self._worker.drop_model(header.model_id)  # it comes back from its jobs that went well
            if SAMPLE not in kinds:
                self._rebuilds.abort(error)
            return [Finished(header.request_id, error=error) for header in held]

    def _deliver(self, finished: Sequence[Finished]) -> None:
        outcomes: list[Outcome] = []
        for done in finished:
            if done.job_id < 0:
                self._rebuilds.take(done)
                continue
            if done.job_id not in self._running:
                continue  # cancelled while its last slice ran
            header, job = self._running.pop(done.job_id)
            try:
                if done.error is not None:
                    raise done.error
                assert done.result is not None  # one of the two is set
                outcomes.append(self._work.finish(job, done.result))
                if job.kind == "forward_backward":
                    self._points.trained(job.model_id or "", job.tokens_in)
            except Exception as error:
                if self._starts_again(header, job, error):
                    continue
                self._endings.fail(job, error)
            self._passed(header)
        if outcomes:
            self._endings.commit(outcomes)
        if finished:
            self._in_flight.set(self._running)

    def _collect_writes(self) -> None:
        self._points.collect()
        for job, writing, future in self._work.writes.ended():
            try:
                self._endings.commit([writing.outcome(future.result())])
                writing.tidy()
            except AWAY:
                raise
            except Exception as error:
                self._endings.fail(job, error)
            self._unblock(_A_WRITE)

    # ---- now and then -----------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """Say which samples run; park idle models; let go of points that nobody will come for."""
        at = time.monotonic()
        if self._unmarked and at >= self._next_mark:
            self._next_mark = at + MARK_STARTED_EVERY_S
            # Most are over before their turn here: those cost no write.
            self._jobs.start([request_id for request_id in self._unmarked if request_id in self._running])
            self._unmarked.clear()
        if at < self._next_housekeeping:
            return
        self._next_housekeeping = at + HOUSEKEEPING_EVERY_S
        self._park_idle()
        self._points.prune(self._ages.before(SILENT_S))
        self._work.reads.drop_untaken()

    def _park_idle(self) -> None:
        """Models of sessions that have finished or expired leave the device, whole; their next job brings them back."""
        busy = {header.model_id for header, _ in (*self._waiting.values(), *self._running.values())}
        resident = [model_id for model_id in self._worker.resident_models if model_id not in busy]
        for model_id in self._sessions.idle_models(resident, self._ages.span(EXPIRED_AFTER_S)[0]):
            if model_id not in self._rebuilds:
                log.info("%s is parked: its session is over", model_id)
                self._worker.park_model(model_id)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the process; every reason not to start is one sentence and exit code 2."""
    config = parse_args(sys.argv[1:] if argv is None else argv, "python -m tx.tinker.engine")
    log_setup.set_up("engine", config.log_level)
    stopping = startup.stop_signals()
    try:
        with startup.start(config) as ready:
            engine = Engine(
                ready.db,
                ready.signal,
                ready.worker,
                ready.folders,
                RecoveryPoints(ready.db, config.recovery_folder, config.base_model_name, ready.worker.export_model),
                InFlight(config.recovery_folder / "in-flight", blameless=was_killed()),
                config.base_model_name,
                sample_room=2 * ready.worker.decode_slots,  # so that slots never wait for the loop
                ages=Uptime(config.recovery_folder / "uptime", settle_s=uptime.SETTLE_S),
            )
            if config.warmup and not config.enforce_eager:
                startup.warm_up(ready.worker, ready.registration, stopping.is_set)
            if not stopping.is_set():
                collect_seldom()
                if config.compile_ahead and not config.enforce_eager:
                    ready.worker.compile_ahead()
                ready.registration.update("ready", decode_slots=ready.worker.decode_slots)
                say_ready()
                log.info("ready")
                engine.run(stopping.is_set)
            log.info("stopped")
    except StartupError as error:
        fail(error)
    logging.shutdown()
    os._exit(0)  # a thread that still writes a checkpoint must not hold the exit: its job is back in the table


if __name__ == "__main__":
    main()
