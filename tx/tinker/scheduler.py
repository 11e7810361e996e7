"""Which waiting jobs may start now, and in what order. Pure: ids and kinds in, ids out; no SQL, no payloads, no JAX.

The rules of one model (design §4):

- its jobs take effect in ``seq_id`` order;
- only ``forward`` and ``forward_backward`` between two barriers commute; chunks of one call arrive in any order;
- every other kind is a barrier: it starts alone, after everything before it has finished, before everything after it.

A client sends a barrier only after all that precedes it was acknowledged, so what waits here is complete: a hole in
the ids is an id that was refused, and nothing waits for it. What arrives behind a barrier that already ran is refused
(``Plan.late``), because it can't take effect in order any more.

Samples wait for the job that makes their sampler, and share ``sample_room``, counted in sequences, round-robin between
sessions.

Example, one model, F = forward_backward, O = optim_step, arriving as F3 F2 F1 O4 F6 F5: F1 F2 F3 start at once in any
order; O4 starts when all three have finished; then F5 and F6.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

COMMUTING = frozenset({"forward", "forward_backward"})
"""Kinds of one model that may run side by side; every other kind of a model is a barrier."""

SAMPLE = "sample"
"""The one kind that belongs to a sampler and not to a model."""


@dataclass(frozen=True)
class JobHeader:
    """All that scheduling must know of a job."""

    request_id: int  # arrival order
    kind: str
    session_id: str | None = None  # the tenant that samples are shared between
    model_id: str | None = None
    seq_id: int | None = None  # order within the model; None is "after what has arrived"
    sampler_id: str | None = None  # of a sample: where it samples; of a save: the sampler that it makes
    num_sequences: int = 1  # of a sample: the decode slots that it wants

    @property
    def is_sample(self) -> bool:
        """Whether this job decodes; all others act on a model."""
        return self.kind == SAMPLE

    @property
    def is_barrier(self) -> bool:
        """Whether the model's other jobs may not run beside this one."""
        return not self.is_sample and self.kind not in COMMUTING


@dataclass(frozen=True)
class Plan:
    """One decision; whatever is in neither list goes on waiting."""

    start: tuple[JobHeader, ...]  # in this order
    late: tuple[JobHeader, ...]  # to be failed: a later barrier of their model has run


def plan(
    waiting: Sequence[JobHeader],
    running: Sequence[JobHeader],
    *,
    sample_room: int,
    last_barrier: Mapping[str, int],
) -> Plan:
    """Decide what starts now.

    Args:
        waiting: claimed jobs that have not started.
        running: jobs that started and have not finished.
        sample_room: how many more sequences the worker may be given; the last request may overstep it.
        last_barrier: by model, the highest ``seq_id`` of a barrier that has run.
    """
    models: defaultdict[str, list[JobHeader]] = defaultdict(list)
    started = {job.request_id for job in running}
    for job in (*running, *waiting):
        if not job.is_sample and job.model_id is not None:
            models[job.model_id].append(job)
    queues, late = [], []
    for model_id, jobs in models.items():
        ready, missed = _plan_model(jobs, started, last_barrier.get(model_id))
        queues.append(ready)
        late.extend(missed)
    unmade = {job.sampler_id for job in (*running, *waiting) if job.is_barrier and job.sampler_id is not None}
    samples = [job for job in waiting if job.is_sample and job.sampler_id not in unmade]
    sampling = [job for job in running if job.is_sample]
    return Plan((*_interleave(queues), *_share(samples, sampling, sample_room)), tuple(late))


def _plan_model(
    jobs: list[JobHeader], started: set[int], last_barrier: int | None
) -> tuple[list[JobHeader], list[JobHeader]]:
    """The jobs of one model that may start now, and those that came too late."""
    ready: list[JobHeader] = []
    late: list[JobHeader] = []
    seen_any = False  # an unfinished job before this one
    seen_barrier = False  # an unfinished barrier before this one
    for job in in_seq_order(jobs):
        if job.request_id not in started:
            if last_barrier is not None and job.seq_id is not None and job.seq_id < last_barrier:
                late.append(job)
                continue
            if not seen_barrier and not (job.is_barrier and seen_any):
                ready.append(job)
        seen_any = True
        seen_barrier |= job.is_barrier
    # A barrier that is running may stand behind jobs that arrived after it started: they wait for it, then are late.
    if any(job.is_barrier and job.request_id in started for job in jobs):
        ready = []
    return ready, late


def in_seq_order(jobs: Iterable[JobHeader]) -> list[JobHeader]:
    """Jobs of one model in the order in which they take effect; one without ``seq_id`` comes after its predecessors.

    Example as (request_id, seq_id): (1, 2) (2, 1) (3, None) (4, 3) becomes (2, 1) (1, 2) (3, None) (4, 3).
    """
    keyed = []
    highest = -1
    for job in sorted(jobs, key=lambda job: job.request_id):
        seq_id = highest if job.seq_id is None else job.seq_id
        highest = max(highest, seq_id)
        keyed.append((seq_id, job.seq_id is None, job.request_id, job))
    return [job for *_, job in sorted(keyed, key=lambda entry: entry[:3])]


def _interleave(queues: Iterable[list[JobHeader]]) -> list[JobHeader]:
    """One of each queue in turn, the queue with the oldest head first."""
    turns = deque(deque(queue) for queue in sorted((q for q in queues if q), key=lambda queue: queue[0].request_id))
    order = []
    while turns:
        queue = turns.popleft()
        order.append(queue.popleft())
        if queue:
            turns.append(queue)
    return order


def _share(samples: list[JobHeader], sampling: list[JobHeader], room: int) -> list[JobHeader]:
    """Samples until ``room`` is taken, each time one of the session with the fewest sequences so far; oldest first."""
    num_running: defaultdict[str | None, int] = defaultdict(int)
    for job in sampling:
        num_running[job.session_id] += job.num_sequences
    queues: defaultdict[str | None, deque[JobHeader]] = defaultdict(deque)
    for job in sorted(samples, key=lambda job: job.request_id):
        queues[job.session_id].append(job)
    chosen: list[JobHeader] = []
    while queues and room > 0:
        session_id = min(queues, key=lambda key: (num_running[key], queues[key][0].request_id))
        job = queues[session_id].popleft()
        chosen.append(job)
        room -= job.num_sequences
        num_running[session_id] += job.num_sequences
        if not queues[session_id]:
            del queues[session_id]
    return chosen
