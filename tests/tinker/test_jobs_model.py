"""The job table against a plain Python model of it, under random interleavings of every verb and of crashes.

The reference is a list of dataclasses; after every step the whole table must say the same. What pruning may take from a
model is not written down a second time: ``plan_replay`` judges it, with every starting point and without the newest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete
from sqlalchemy import select as select_columns
from sqlalchemy.engine import Engine as Database
from sqlmodel import select

from tx.errors import InvalidInput, ModelLost, NotFound, Overloaded
from tx.tinker.db import Cancellation, Checkpoint, Job, RecoveryPoint, Sampler, now, open_database, reading, writing
from tx.tinker.jobs import CANCELLED, JOB_KINDS, Appended, JobTable, NewJob, Outcome
from tx.tinker.pruning import prune
from tx.tinker.recovery import ORIGINS, Replay, plan_replay

BASES = ("org/base", "org/other")
MAX_QUEUED = 6

MODELS = {"a:train:0": BASES[0], "b:train:0": BASES[0]}
SAMPLERS = {"a:sample:0": BASES[0], "b:sample:0": BASES[0], "c:sample:0": BASES[1]}
BASE_OF = MODELS | SAMPLERS

TRAINING_KINDS = ("forward_backward", "forward", "optim_step", "load_weights", "save_weights", "unload_model")
FINAL = ("done", "failed")


@dataclass
class Row:
    """What the table must say of one job."""

    request_id: int
    kind: str
    owner: str
    seq_id: int | None
    fingerprint: str
    num_sequences: int
    status: str = "pending"
    payload: bytes | None = b""
    result: bytes | None = None
    error: str | None = None
    category: str | None = None
    started: bool = False
    attempts: int = 0
    finish_seq: int | None = None
    finish_tick: int = 0

    @property
    def base_model(self) -> str:
        return BASE_OF[self.owner]

    @property
    def session_id(self) -> str:
        return self.owner.partition(":")[0]

    def as_seen(self) -> tuple:
        return (
            self.request_id, self.kind, self.owner, self.seq_id, self.fingerprint, self.status, self.payload,
            self.result, self.error, self.category, self.started, self.attempts, self.finish_seq,
        )  # fmt: skip


@dataclass
class Reference:
    """The verbs of ``JobTable``, on a list."""

    rows: dict[int, Row] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    tick: int = 0

    def unfinished(self, base_model: str) -> int:
        """Sequences that wait or decode."""
        return sum(
            row.num_sequences for row in self.rows.values() if row.base_model == base_model and row.status not in FINAL
        )

    def first(self, new: NewJob) -> Row | None:
        owner = new.model_id or new.sampler_id
        if new.seq_id is None:
            return None
        return next((row for row in self.rows.values() if (row.owner, row.seq_id) == (owner, new.seq_id)), None)

    def claim(self, base_model: str, limit: int, kinds: tuple[str, ...], in_turn: bool) -> list[int]:
        """Marks them running; their ids."""
        pending = [row for row in self.rows.values() if (row.base_model, row.status) == (base_model, "pending")]
        pending = sorted((row for row in pending if row.kind in kinds), key=lambda row: row.request_id)
        if in_turn:
            turns: dict[str, int] = {}
            ranked = []
            for row in pending:
                turns[row.session_id] = turns.get(row.session_id, 0) + 1
                ranked.append((turns[row.session_id], row.request_id, row))
            pending = [row for _, _, row in sorted(ranked, key=lambda each: each[:2])]
        for row in pending[:limit]:
            row.status = "running"
        return sorted(row.request_id for row in pending[:limit])

    def finish(self, row: Row, **values: object) -> None:
        """``finish_seq`` counts what a sampler has finished: 1, 2, 3, …"""
        vars(row).update(values, finish_tick=self.tick)
        if row.owner in SAMPLERS:
            others = [other.finish_seq or 0 for other in self.rows.values() if other.owner == row.owner]
            row.finish_seq = max(others) + 1

    def can_cancel(self, row: Row) -> bool:
        return row.status == "pending" or (row.status == "running" and row.kind == "sample")


owners = st.sampled_from(sorted(BASE_OF))
batches = st.lists(
    st.tuples(owners, st.sampled_from(TRAINING_KINDS), st.integers(0, 6), st.sampled_from("xxy"), st.integers(1, 3)),
    min_size=1,
    max_size=4,
)


class JobTableMachine(RuleBasedStateMachine):
    """One run: verbs in any order on an empty table."""

    db: Database

    @initialize()
    def empty(self) -> None:
        self.jobs = JobTable(self.db, max_queued_samples=MAX_QUEUED)
        self.reference = Reference()
        self.marks = [0.0]  # a time before which everything of that many ticks was finished
        with writing(self.db) as session:
            for table in (Job, Cancellation, Checkpoint, RecoveryPoint):
                session.exec(delete(table))

    # ---- verbs ----

    @rule(batch=batches, bad=st.booleans())
    def append(self, batch: list, bad: bool) -> None:
        """New requests, retries and reused numbers, in one transaction."""
        self._append([self._new(*each, bad=bad and number == 0) for number, each in enumerate(batch)])

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """The same request once more, in whatever state its job is by now."""
        row = data.draw(st.sampled_from(sorted(self.reference.rows.values(), key=lambda row: row.request_id)))
        if row.seq_id is not None:
            (answer,) = self.jobs.append([self._new(row.owner, row.kind, row.seq_id, row.fingerprint, 1, again=True)])
            assert answer == Appended(row.request_id, created=False)

    @rule(
        base=st.sampled_from(BASES),
        limit=st.integers(1, 4),
        kinds=st.just(JOB_KINDS) | st.sets(st.sampled_from(JOB_KINDS), min_size=1).map(lambda k: tuple(sorted(k))),
        in_turn=st.booleans(),
    )
    def claim(self, base: str, limit: int, kinds: tuple[str, ...], in_turn: bool) -> None:
        claimed = self.jobs.claim(base, limit, kinds, in_turn=in_turn)
        assert [job.request_id for job in claimed] == self.reference.claim(base, limit, kinds, in_turn)
        for job in claimed:
            assert job.payload == self.reference.rows[job.request_id].payload

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """Outcomes of any jobs, also of those that are finished: they keep their first."""
        outcomes = []
        for request_id in data.draw(st.lists(self._ids(), min_size=1, max_size=4, unique=True)):
            result = f"result {request_id} of tick {self.reference.tick}".encode()
            outcomes.append(Outcome(request_id, result))
            row = self.reference.rows[request_id]
            if row.status not in FINAL:
                self.reference.finish(row, status="done", result=result)
        self.jobs.commit(outcomes)

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data(), category=st.sampled_from(("user", "server")))
    def fail(self, data: st.DataObject, category: str) -> None:
        row = self.reference.rows[data.draw(self._ids())]
        self.jobs.fail(row.request_id, "no", category)
        if row.status not in FINAL:
            self.reference.finish(row, status="failed", error="no", category=category)

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = sorted(data.draw(st.sets(self._ids(), max_size=3)))
        expected = 0
        for row in (self.reference.rows[request_id] for request_id in chosen):
            if self.reference.can_cancel(row):
                expected += 1
                if row.status == "running":
                    self.reference.cancelled.add(row.request_id)
                self.reference.finish(row, status="failed", error=CANCELLED, category="user")
        assert self.jobs.cancel(*chosen) == expected

    @rule(base=st.sampled_from(BASES))
    def take_cancelled(self, base: str) -> None:
        expected = {each for each in self.reference.cancelled if self.reference.rows[each].base_model == base}
        assert sorted(self.jobs.take_cancelled(base)) == sorted(expected)
        self.reference.cancelled -= expected

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(self._ids(), max_size=3))
        self.jobs.start(chosen)
        for row in (self.reference.rows[request_id] for request_id in chosen):
            row.started |= row.status == "running"

    @rule(data=st.data(), base=st.sampled_from(BASES))
    def crash(self, data: st.DataObject, base: str) -> None:
        """The engine dies, with some of its jobs in the worker; the next one puts back what ran."""
        running = [row for row in self.reference.rows.values() if (row.base_model, row.status) == (base, "running")]
        ids = sorted(row.request_id for row in running)
        suspects = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
        assert self.jobs.requeue(base, suspects) == len(running)
        for row in running:
            row.status, row.started = "pending", False
            row.attempts += row.request_id in suspects

    # ---- a model's life, as the engine makes it ----

    @rule(
        owner=st.sampled_from(sorted(MODELS)),
        steps=st.sampled_from((0, 0, 1, 2)),
        then=st.sampled_from(("checkpoint", "checkpoint", "point", "nothing")),
        whole=st.booleans(),
        expires=st.booleans(),
    )
    def train(self, owner: str, steps: int, then: str, whole: bool, expires: bool) -> None:
        """Created if need be, then some steps that go well, in order; then perhaps its state is written."""
        used = {row.seq_id for row in self.reference.rows.values() if row.owner == owner and row.seq_id is not None}
        kinds = [] if 0 in used else [(0, "create_model")]
        first = max(used, default=0) + 1
        for step in range(steps):
            kinds += [(first + 2 * step, "forward_backward"), (first + 2 * step + 1, "optim_step")]
        for seq_id, kind in kinds:
            (request_id,) = self._append([self._new(owner, kind, seq_id, "x", 1)])
            self.reference.finish(self.reference.rows[request_id], status="done", result=b"ok")
            self.jobs.commit([Outcome(request_id, b"ok")])
        applied = self._applied(owner)
        if applied is None or then == "nothing":
            return
        if then == "checkpoint":
            self._save(owner, applied, whole, expires)
        elif steps:
            self._take_point(owner, applied)

    @rule(owner=st.sampled_from(sorted(MODELS)), whole=st.booleans(), expires=st.booleans())
    def save(self, owner: str, whole: bool, expires: bool) -> None:
        """A checkpoint after whatever the random verbs have made of the model."""
        applied = self._applied(owner)
        if applied is not None:
            self._save(owner, applied, whole, expires)

    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        """Results and needless payloads of what was finished before then; never what a replay needs."""
        now_tick = self.reference.tick
        tick = data.draw(st.just(now_tick) | st.integers(0, now_tick), label="before tick")
        before = [self._replays(owner) for owner in MODELS]
        prune(self.db, self.marks[tick])
        assert [self._replays(owner) for owner in MODELS] == before
        with reading(self.db) as session:
            kept = dict(session.connection().execute(select_columns(Job.request_id, Job.payload.is_not(None))).all())
        for row in self.reference.rows.values():
            if row.status not in FINAL or row.finish_tick >= tick:
                continue
            if row.status == "failed" or row.owner in SAMPLERS:
                assert not kept[row.request_id], "nobody can need it"
            if not kept[row.request_id]:
                row.payload = None
            if row.payload is None or row.kind != "load_weights":  # it tells whether its path has changed since
                row.result = None

    # ---- what must hold after every step ----

    @invariant()
    def next_tick(self) -> None:
        self.reference.tick += 1
        self.marks.append(now())

    @invariant()
    def table_says_what_the_reference_says(self) -> None:
        with reading(self.db) as session:
            rows = session.exec(select(Job).order_by(Job.request_id)).all()
        seen = [
            (
                job.request_id, job.kind, job.model_id or job.sampler_id, job.seq_id, job.fingerprint, job.status,
                job.payload, job.result, job.error, job.category, job.started_at is not None, job.attempts,
                job.finish_seq,
            )
            for job in rows
        ]  # fmt: skip
        expected = sorted(self.reference.rows.values(), key=lambda row: row.request_id)
        assert seen == [row.as_seen() for row in expected]
        assert all((job.finished_at is not None) == (job.status in FINAL) for job in rows)
        assert all((job.claimed_at is not None) or job.status != "running" for job in rows)
        numbered = [(row.owner, row.seq_id) for row in expected if row.seq_id is not None]
        assert len(set(numbered)) == len(numbered)

    @rule()
    def read(self) -> None:
        """What clients and the engine ask for says the same as the table."""
        rows = self.reference.rows
        finished = {request_id for request_id, row in rows.items() if row.status in FINAL}
        assert self.jobs.finished_ids(rows) == finished
        for request_id in finished:
            assert self.jobs.get(request_id).result == rows[request_id].result
        assert self.jobs.num_pending() == len(rows) - len(finished)
        for base in BASES:
            assert self.jobs.unfinished_sequences(base) == self.reference.unfinished(base)
        last = self.jobs.last_finished(SAMPLERS)
        for sampler in SAMPLERS:
            order = sorted((row.finish_seq, row) for row in rows.values() if row.owner == sampler and row.finish_seq)
            assert [finish_seq for finish_seq, _ in order] == list(range(1, len(order) + 1))
            for after in {0, len(order) // 2}:
                listed = self.jobs.completions(sampler, after)
                assert [(one.request_id, one.seq_id, one.failed) for one in listed] == [
                    (row.request_id, row.seq_id, row.status == "failed") for _, row in order[after:]
                ]
            assert last[sampler] == len(order)

    # ---- how ----

    def _ids(self) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(self.reference.rows))

    def _new(
        self, owner: str, kind: str, seq_id: int | None, fingerprint: str, count: int, bad: bool = False,
        again: bool = False,
    ) -> NewJob:  # fmt: skip
        is_sample = owner in SAMPLERS
        kind = "sample" if is_sample else kind
        if kind == "unload_model" and not again:
            seq_id = None
        return NewJob(
            kind=kind,
            base_model=BASE_OF[owner],
            payload=f"{owner} {kind} {seq_id} {fingerprint}".encode(),
            session_id=owner.partition(":")[0],
            model_id=None if is_sample else owner,
            sampler_id=owner if is_sample else None,
            seq_id=seq_id,
            fingerprint=fingerprint,
            num_sequences=count if is_sample else 0,
            error="known to be wrong" if bad and not is_sample else None,
        )

    def _append(self, batch: list[NewJob]) -> list[int]:
        """Append, and compare each answer; the ids of what was stored."""
        stored = []
        for new, answer in zip(batch, self.jobs.append(batch), strict=True):
            first = self.reference.first(new)
            if first is not None and (first.kind, first.fingerprint) != (new.kind, new.fingerprint):
                assert isinstance(answer, InvalidInput)
                assert answer.field == "seq_id"
                continue
            if first is not None:
                assert answer == Appended(first.request_id, created=False)
                continue
            waiting = self.reference.unfinished(new.base_model)
            if new.num_sequences and waiting + new.num_sequences > MAX_QUEUED:
                assert isinstance(answer, Overloaded)
                continue
            assert isinstance(answer, Appended)
            assert answer.created
            assert answer.request_id > max(self.reference.rows, default=0)
            row = Row(
                answer.request_id, new.kind, new.model_id or new.sampler_id, new.seq_id, new.fingerprint,
                new.num_sequences, payload=new.payload,
            )  # fmt: skip
            self.reference.rows[answer.request_id] = row
            stored.append(answer.request_id)
            if new.error is not None:
                self.reference.finish(row, status="failed", error=new.error, category="user")
        return stored

    def _save(self, owner: str, applied: int, whole: bool, expires: bool) -> None:
        with writing(self.db) as session:
            number = len(session.exec(select(Checkpoint.id)).all())
            session.add(
                Checkpoint(
                    model_id=owner,
                    kind="weights",
                    name=str(number),
                    folder=str(number),
                    size_bytes=1,
                    created_at=now(),
                    expires_at=now() + 3600 if expires else None,
                    seq_id=applied,
                    has_optimizer=whole,
                )
            )

    def _take_point(self, owner: str, applied: int) -> None:
        """The two newest stay."""
        with writing(self.db) as session:
            session.merge(
                RecoveryPoint(model_id=owner, seq_id=applied, base_model=BASES[0], size_bytes=1, created_at=now())
            )
            session.flush()
            points = session.exec(select(RecoveryPoint).where(RecoveryPoint.model_id == owner)).all()
            for old in sorted(points, key=lambda point: -point.seq_id)[2:]:
                session.delete(old)

    def _applied(self, owner: str) -> int | None:
        """Seq of the last job whose effect the model's weights hold; None if it was never created."""
        effects = [
            row
            for row in self.reference.rows.values()
            if row.owner == owner and row.status == "done" and (row.kind in ORIGINS or row.kind == "optim_step")
        ]
        created = any(row.kind in ORIGINS for row in effects)
        return max(row.seq_id for row in effects) if created else None

    def _replays(self, owner: str) -> list:
        """How the model would come back: from all that is there, if its owner deleted his checkpoints, if its newest
        recovery point were damaged, or both.
        """
        with reading(self.db) as session:
            checkpoints = session.exec(select(Checkpoint).where(Checkpoint.model_id == owner)).all()
            points = session.exec(select(RecoveryPoint).where(RecoveryPoint.model_id == owner)).all()
        points = sorted(points, key=lambda point: point.seq_id)
        history = self.jobs.history(owner)
        return [
            self._outcome(lambda: plan_replay(owner, history, [*saved, *some]))  # noqa: B023 (called at once)
            for saved in (checkpoints, [])
            for some in (points, points[:-1])
        ]

    def _outcome(self, plan: Callable[[], Replay]) -> object:
        try:
            replay = plan()
        except (NotFound, ModelLost) as error:
            return type(error)
        start = None if replay.start is None else (type(replay.start), replay.start.seq_id)
        return start, [(job.request_id, job.payload) for job in replay.jobs]


@pytest.mark.parametrize(("kind", "examples", "steps"), [("sqlite", 30, 40), ("postgresql", 8, 40)])
def test_the_job_table_is_its_model(request, kind, examples, steps):
    db = open_database(request.getfixturevalue("sqlite_url" if kind == "sqlite" else "postgres_url"))
    with writing(db) as session:
        for number, (sampler_id, base_model) in enumerate(SAMPLERS.items()):
            session.add(
                Sampler(
                    sampler_id=sampler_id, session_id="s", seq=number, base_model=base_model, served_name=base_model,
                    kind="base", created_at=0.0,
                )
            )  # fmt: skip
    machine = type("Machine", (JobTableMachine,), {"db": db})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
    finally:
        db.dispose()
