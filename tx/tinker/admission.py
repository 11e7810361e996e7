"""Room in the queue: which samples a full one refuses, of a base model or of one API key.

To count a queue of 100,000 takes 25 ms, and whoever appends has the only turn to write meanwhile, so counting is done
before and seldom. In between there is an upper bound: what is appended here is added, what has ended stays in, and
nobody is refused but after a fresh count. With several API processes a limit can be passed by what the others have
appended since the last count.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import func
from sqlalchemy.engine import Engine as Database
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.errors import InvalidInput, Overloaded
from tx.tinker.db import UNFINISHED, Job, Session, reading

COUNT_EVERY_S = 1.0


@dataclass(frozen=True)
class Share:
    """Of the queue: at most so many unfinished sequences of one owner."""

    owner: str
    max_sequences: int


@dataclass(frozen=True)
class Ask:
    """What asks for room; ``num_sequences`` is 0 for all but samples, and those always find it."""

    base_model: str
    num_sequences: int
    share: Share | None = None


@dataclass(frozen=True)
class _Limit:
    """``count``: what is under it now. ``says`` and ``full``: what to tell who asks for more, ever or now."""

    name: str
    count: Callable[[DbSession], int]
    most: int
    says: str
    full: str


@dataclass
class _Bound:
    count: int
    counted_at: float


class Admission:
    """Room for samples. One thread at a time.

    Args:
        max_queued: unfinished sequences of one base model past which samples are refused (None: never).
        clock: seconds, for the age of a count.
    """

    def __init__(self, db: Database, max_queued: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._max_queued = max_queued
        self._clock = clock
        self._bounds: dict[str, _Bound] = {}  # by limit

    def expect(self, asks: Iterable[Ask]) -> None:
        """Count where that is needed to decide on all of these; before the transaction that appends them."""
        limits: dict[str, _Limit] = {}
        asked: Counter[str] = Counter()
        for ask in asks:
            for limit in self._limits(ask):
                limits[limit.name] = limit
                asked[limit.name] += ask.num_sequences
        for name, limit in limits.items():
            bound = self._bounds.get(name)
            fresh = bound is not None and self._clock() - bound.counted_at < COUNT_EVERY_S
            if bound is None or not fresh or bound.count + asked[name] > limit.most:
                with reading(self._db) as session:
                    self._bounds[name] = _Bound(limit.count(session), self._clock())

    def admit(self, ask: Ask) -> Overloaded | InvalidInput | None:
        """Let one of those in that were expected, or say why not."""
        limits = self._limits(ask)
        for limit in limits:
            queued = self._bounds[limit.name].count
            if ask.num_sequences > limit.most:
                return InvalidInput("num_samples", ask.num_sequences, limit.says)
            if queued + ask.num_sequences > limit.most:
                return Overloaded(f"{queued} sequences {limit.full}; send the request again in a second.")
        for limit in limits:
            self._bounds[limit.name].count += ask.num_sequences
        return None

    def _limits(self, ask: Ask) -> list[_Limit]:
        limits: list[_Limit] = []
        if ask.num_sequences and ask.share is not None:
            owner, most = ask.share.owner, ask.share.max_sequences
            limits.append(
                _Limit(
                    f"owner {owner}",
                    lambda session: _sequences_of_owner(session, owner),
                    most,
                    says=f"at most {most} with this API key",
                    full=f"of this API key wait or decode and it may have {most}",
                )
            )
        if ask.num_sequences and self._max_queued is not None:
            limits.append(
                _Limit(
                    f"base model {ask.base_model}",
                    lambda session: unfinished_sequences(session, ask.base_model),
                    self._max_queued,
                    says=f"at most {self._max_queued} (--max-queued-samples)",
                    full=f"wait or decode and this server takes {self._max_queued} (--max-queued-samples)",
                )
            )
        return limits


def unfinished_sequences(session: DbSession, base_model: str) -> int:
    """How many sequences of this base model wait or decode. Reads one index."""
    query = select(func.sum(Job.num_sequences)).where(
        col(Job.status).in_(UNFINISHED), Job.base_model == base_model, col(Job.num_sequences) > 0
    )
    return int(session.exec(query).one() or 0)


def _sequences_of_owner(session: DbSession, owner: str) -> int:
    query = (
        select(func.sum(Job.num_sequences))
        .join(Session, col(Session.session_id) == col(Job.session_id))
        .where(col(Job.status).in_(UNFINISHED), col(Job.num_sequences) > 0, Session.owner == owner)
    )
    return int(session.exec(query).one() or 0)
