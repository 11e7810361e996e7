"""From what a lost model is rebuilt: a starting point and the finished jobs to do over. Pure: rows in, a plan out.

A model is a function of its jobs: its creation (or load), then every ``forward_backward``, ``optim_step`` and load that
went well, in seq order. A state that was written whole, a recovery point or a training checkpoint with optimizer state,
stands for all of them up to its ``seq_id``, which is that of the last job whose effect on weights or moments it holds:
gradients that were waiting for a step when it was written come after it. Replaying answers nobody: those jobs have
their results already.

Example: create 0, fb 1, optim 2, fb 3, save 4 (checkpoint seq 2), optim 5, crash. The replay is: checkpoint, fb 3,
optim 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tx.errors import ModelLost, NotFound
from tx.tinker.db import Checkpoint, Job, RecoveryPoint
from tx.tinker.scheduler import JobHeader, in_seq_order

ORIGINS = frozenset({"create_model", "load_weights"})
"""Kinds that set a model's whole state: nothing before them matters."""

EFFECTS = ORIGINS | {"forward_backward", "optim_step"}


@dataclass(frozen=True)
class Replay:
    """Restore ``start`` if there is one, then do ``jobs`` over, in this order."""

    start: Checkpoint | RecoveryPoint | None
    jobs: tuple[Job, ...]


def plan_replay(
    model_id: str,
    history: Sequence[Job],
    starts: Sequence[Checkpoint | RecoveryPoint],
    until: int | None = None,
) -> Replay:
    """How to rebuild a model, as it is now or as it was when the job ``until`` (a request id) ran.

    Args:
        history: the model's jobs that went well.
        starts: checkpoints and recovery points of this model that exist.

    Raises:
        NotFound: the model was never created, or was unloaded.
        ModelLost: a payload that is needed has been pruned.
    """
    by_id = {job.request_id: job for job in history}
    headers = [JobHeader(job.request_id or 0, job.kind, model_id=model_id, seq_id=job.seq_id) for job in history]
    ordered = [by_id[header.request_id] for header in in_seq_order(headers)]
    if until is not None:
        ordered = ordered[: [job.request_id for job in ordered].index(until)] if until in by_id else []
    elif any(job.kind == "unload_model" for job in ordered):
        raise NotFound("model_id", model_id, "a model that has not been unloaded")
    effects = [job for job in ordered if job.kind in EFFECTS]
    origins = [i for i, job in enumerate(effects) if job.kind in ORIGINS]
    if not origins:
        raise NotFound("model_id", model_id, "a model that was created")
    effects = effects[origins[-1] :]
    start = _newest(effects, starts)
    if start is not None:
        effects = [job for job in effects if _seq(job) > _seq(start)]
    pruned = [job.request_id for job in effects if job.payload is None]
    if pruned:
        raise ModelLost(f"{model_id} can't be rebuilt: the payloads of its jobs {pruned[:5]} have been pruned.")
    return Replay(start, tuple(effects))


def _newest(effects: Sequence[Job], starts: Sequence[Checkpoint | RecoveryPoint]) -> Checkpoint | RecoveryPoint | None:
    """The latest whole state that lies within ``effects``, if their order is known by seq.

    Of a point and a checkpoint of the same job the point: it was written without a change of format.
    """
    if any(job.seq_id is None for job in effects):
        return None
    first, last = _seq(effects[0]), _seq(effects[-1])
    whole = [start for start in starts if _is_whole(start) and first <= _seq(start) <= last]
    return max(whole, key=lambda start: (_seq(start), isinstance(start, RecoveryPoint), start.created_at), default=None)


def _is_whole(start: Checkpoint | RecoveryPoint) -> bool:
    return isinstance(start, RecoveryPoint) or (start.kind == "weights" and start.has_optimizer)


def _seq(row: Job | Checkpoint | RecoveryPoint) -> int:
    return -1 if row.seq_id is None else row.seq_id
