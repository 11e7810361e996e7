"""Host book-keeping of the sampler: whose turn it is, who sits in which decode slot, how large the cache is. No JAX.

A *group* is the ``num_samples`` rows of one request, known here by its job id alone. Groups wait in a queue per owner
(the snapshot they sample from); owners take turns, so that a tenant with a thousand requests delays another by one
turn and not by a thousand. A group with more rows than there are free slots is seated in parts.

Not here: tokens, arrays, or when a row ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

ROW_BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sizes of the decode batch. Each is one more program to compile per cache length; a step's cost follows the bucket."""

MIN_CACHE_LENGTH = 256
MIN_PREFILL_LENGTH = 32


def bucket_rows(rows: int, limit: int) -> int:
    """The smallest decode batch that holds ``rows`` (at least one), never above ``limit``."""
    return next((size for size in ROW_BUCKETS if rows <= size < limit), limit)


def bucket_cache_length(length: int, limit: int) -> int:
    """The smallest cache length that holds ``length`` positions: powers of two from 256, capped by the context."""
    size = MIN_CACHE_LENGTH
    while size < length:
        size *= 2
    return min(size, limit)


def bucket_prefill_length(length: int, limit: int) -> int:
    """The padded length of a prompt: 32, 48, 64, 96, 128, … so that padding stays below a half, capped by ``limit``.

    Worked example: 33 → 48, 65 → 96, 97 → 128, 300 → 384; with limit 90, 65 → 90.
    """
    size = MIN_PREFILL_LENGTH
    while size < length:
        if size * 3 // 2 >= length:
            size = size * 3 // 2
            break
        size *= 2
    return min(size, limit)


def choose_size(
    current: tuple[int, int], needed: tuple[int, int], known: Collection[tuple[int, int]]
) -> tuple[int, int]:
    """The (rows, length) of the cache for the next slice, from bucketed sizes.

    Growth is unconditional. Shrinking pays its copy at once, but a program of a new size costs seconds to compile: a
    cache shrinks to a size that ran before, or when at least three quarters of it are unused.
    """
    grown = (max(current[0], needed[0]), max(current[1], needed[1]))
    if needed[0] * needed[1] * 4 <= grown[0] * grown[1]:
        return needed
    smaller = [size for size in known if needed[0] <= size[0] <= grown[0] and needed[1] <= size[1] <= grown[1]]
    return min([*smaller, grown], key=lambda size: size[0] * size[1])


@dataclass(frozen=True)
class Seat:
    """Who sits in a slot: which sample of which group."""

    job_id: int
    sample: int


class DecodeSlots:
    """The waiting groups and the seats.

    Attributes:
        limit: rows that may decode at once; lowered when the device has no room for more.
        seats: one entry per row of the decode batch, None where nobody sits.
    """

    def __init__(self, max_slots: int) -> None:
        self.limit = max_slots
        self.seats: list[Seat | None] = []
        # Owners in the order of their turns. The samples of a group that wait for a slot, by job id.
        self._queues: dict[Hashable, deque[int]] = {}
        self._unseated: dict[int, deque[int]] = {}

    # ---- waiting --------------------------------------------------------------------------------------------------

    def enqueue(self, job_id: int, owner: Hashable, samples: Sequence[int], *, first: bool = False) -> None:
        """Let ``samples`` of a group wait; ``first`` puts it ahead of its owner's others (a group that sat before)."""
        if job_id in self._unseated:
            self._unseated[job_id] = deque(sorted({*self._unseated[job_id], *samples}))
            return
        self._unseated[job_id] = deque(samples)
        queue = self._queues.setdefault(owner, deque())
        if first:
            queue.appendleft(job_id)
        else:
            queue.append(job_id)

    def in_turn(self) -> Iterator[int]:
        """Waiting job ids in the order in which they will be seated: one of each owner per round."""
        queues = [list(queue) for queue in self._queues.values()]
        for at in range(max((len(queue) for queue in queues), default=0)):
            yield from (queue[at] for queue in queues if at < len(queue))

    def head(self) -> int | None:
        """The group whose turn it is; stays the same until it is seated or cancelled."""
        return next((queue[0] for queue in self._queues.values()), None)

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a slot."""
        return sum(len(samples) for samples in self._unseated.values())

    # ---- seats ----------------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        """Rows that sit in a slot."""
        return sum(seat is not None for seat in self.seats)

    @property
    def num_free(self) -> int:
        """Rows that may still be seated."""
        return max(0, self.limit - self.num_live)

    def live(self) -> list[tuple[int, Seat]]:
        """(slot, seat) of every row that decodes."""
        return [(slot, seat) for slot, seat in enumerate(self.seats) if seat is not None]

    def resize(self, num_slots: int) -> list[int]:
        """Change the number of seats to at least the live rows.

        Returns:
            For each new slot the old slot whose cache it takes over, -1 for none. Rows keep their slots when the batch
            grows and move together when it shrinks: seats [a, -, b, -] resized to 2 are [a, b] and give [0, 2].
        """
        if num_slots >= len(self.seats):
            sources = list(range(len(self.seats)))
        else:
            sources = [slot for slot, _ in self.live()]
        if len(sources) > num_slots:
            raise ValueError(f"num_slots: got {num_slots}, accepted: at least the {len(sources)} live rows")
        sources += [-1] * (num_slots - len(sources))
        self.seats = [self.seats[old] if old >= 0 else None for old in sources]
        return sources

    def seat(self, job_id: int) -> list[tuple[int, Seat]]:
        """Seat as many of a waiting group's rows as there are free seats; then it is the next owner's turn."""
        samples = self._unseated[job_id]
        empty = [slot for slot, taken in enumerate(self.seats) if taken is None]
        seated = [(slot, Seat(job_id, samples.popleft())) for slot in empty[: min(len(samples), self.num_free)]]
        for slot, seat in seated:
            self.seats[slot] = seat
        owner = self._owner(job_id)
        queue = self._queues.pop(owner)
        if not samples:
            del self._unseated[job_id]
            queue.remove(job_id)
        if queue:
            self._queues[owner] = queue
        return seated

    def release(self, slot: int) -> None:
        """The row in ``slot`` has ended."""
        self.seats[slot] = None

    def remove(self, job_id: int) -> None:
        """Forget a group wherever its rows are; unknown ids are fine."""
        self.seats = [None if seat is not None and seat.job_id == job_id else seat for seat in self.seats]
        if self._unseated.pop(job_id, None) is not None:
            owner = self._owner(job_id)
            self._queues[owner].remove(job_id)
            if not self._queues[owner]:
                del self._queues[owner]

    def _owner(self, job_id: int) -> Hashable:
        return next(owner for owner, queue in self._queues.items() if job_id in queue)
