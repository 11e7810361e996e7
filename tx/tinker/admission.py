"""Room in the queue: which samples a full one refuses, of a base model or of one API key."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func
from sqlmodel import Session as DbSession
from sqlmodel import col, select

from tx.errors import InvalidInput, Overloaded
from tx.tinker.db import UNFINISHED, Job, Session


@dataclass(frozen=True)
class Share:
    """Of the queue: at most so many unfinished sequences of one owner."""

    owner: str
    max_sequences: int


class Admission:
    """Room for samples in one transaction: the queue is counted once, and only if a new sample asks.

    Args:
        max_queued: unfinished sequences of one base model past which samples are refused (None: never).
    """

    def __init__(self, session: DbSession, max_queued: int | None) -> None:
        self._session = session
        self._max_queued = max_queued
        self._counts: dict[str, int] = {}  # by base model
        self._shares: dict[str, int] = {}  # by owner

    def admit(self, base_model: str, num_sequences: int, share: Share | None) -> Overloaded | InvalidInput | None:
        """Count a sample in, or say why not; what is no sample has no sequences and always finds room."""
        if not num_sequences:
            return None
        return self._refusal_of_share(num_sequences, share) or self._refusal_of_queue(base_model, num_sequences)

    def _refusal_of_share(self, num_sequences: int, share: Share | None) -> Overloaded | InvalidInput | None:
        if share is None:
            return None
        if num_sequences > share.max_sequences:
            return InvalidInput("num_samples", num_sequences, f"at most {share.max_sequences} with this API key")
        if share.owner not in self._shares:
            self._shares[share.owner] = _sequences_of_owner(self._session, share.owner)
        queued = self._shares[share.owner]
        if queued + num_sequences > share.max_sequences:
            return Overloaded(
                f"{queued} sequences of this API key wait or decode and it may have {share.max_sequences}; "
                "send the request again in a second."
            )
        self._shares[share.owner] += num_sequences
        return None

    def _refusal_of_queue(self, base_model: str, num_sequences: int) -> Overloaded | InvalidInput | None:
        limit = self._max_queued
        if limit is None:
            return None
        if num_sequences > limit:
            return InvalidInput("num_samples", num_sequences, f"at most {limit} (--max-queued-samples)")
        if base_model not in self._counts:
            self._counts[base_model] = unfinished_sequences(self._session, base_model)
        queued = self._counts[base_model]
        if queued + num_sequences > limit:
            return Overloaded(
                f"{queued} sequences wait or decode and this server takes {limit} (--max-queued-samples); "
                "send the request again in a second."
            )
        self._counts[base_model] += num_sequences
        return None


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
