"""Host book-keeping of the sampler: whose turn it is, who decodes, which sizes of batch and pool there are. No JAX.

A *group* is the ``num_samples`` rows of one request, known here by its job id alone. Groups wait in a queue per owner
(the snapshot they sample from); owners take turns, so that a tenant with a thousand requests delays another by one
turn and not by a thousand. A group with more rows than there are free slots is seated in parts. Rows that decode stand
in the order in which they were seated.

Not here: tokens, arrays, blocks of the KV pool, or when a row ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

ROW_BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sizes of the decode batch. Each is one more program to compile per size of pool; a step's cost follows the bucket."""

MIN_BLOCKS_PER_ROW = 4

COMPILE_S = 3.0
"""What a decode program of a small model takes to compile on a CPU; larger models waste more per step, too."""

_SAVED = 0.7
"""A step's cost grows more slowly than its rows: what fewer of them save, as a share of a proportional saving."""

Size = tuple[int, int]
"""Rows and blocks of a decode program."""

MIN_PREFILL_LENGTH = 32


def bucket_rows(rows: int, limit: int) -> int:
    """The smallest decode batch that holds ``rows`` (at least one), never above ``limit``."""
    return next((size for size in ROW_BUCKETS if rows <= size < limit), limit)


def bucket_blocks(blocks: int, rows: int, limit: int) -> int:
    """The smallest pool for a batch of ``rows`` that holds ``blocks``: 4, 8, 16, … per row, capped by ``limit``.

    Tied to the rows, so that rows of usual lengths need one size of pool per size of batch.
    """
    size = MIN_BLOCKS_PER_ROW * rows
    while size < blocks:
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


class Sizes:
    """Which (rows, blocks) the next decode slice runs with: the one that fits, or a larger one that is compiled.

    A program of a new size costs ``COMPILE_S``. So what a larger, known one wastes is added up per missing size, and
    the size is compiled once that much has been wasted: at worst about twice what the best choice would have cost.
    """

    def __init__(self) -> None:
        self.step_s: dict[Size, float] = {}
        """By size that is compiled, what a step took last; 0.0 until that is known, as a first run compiles."""
        self._wasted_s: dict[Size, float] = {}

    def choose(self, wanted: Size, steps: int) -> Size:
        """The size for a slice of so many steps of which ``wanted`` would be the smallest."""
        known = list(self.step_s)  # ``expect`` may add to it meanwhile
        larger = [size for size in known if size[0] >= wanted[0] and size[1] >= wanted[1]]
        if wanted in self.step_s or not larger:
            return wanted
        best = min(larger)
        wasted = steps * self.step_s[best] * (1 - wanted[0] / best[0]) * _SAVED
        self._wasted_s[wanted] = self._wasted_s.get(wanted, 0.0) + wasted
        return best if self._wasted_s[wanted] < COMPILE_S else wanted

    def expect(self, size: Size) -> None:
        """A program of this size has been compiled ahead; may be called in another thread than the rest."""
        self.step_s.setdefault(size, 0.0)

    def note(self, size: Size, step_s: float) -> None:
        """A slice of this size has run."""
        self.step_s[size] = step_s if size in self.step_s else 0.0


@dataclass(frozen=True)
class Seat:
    """A row that decodes: which sample of which group."""

    job_id: int
    sample: int


class DecodeSlots:
    """The waiting groups and the seats.

    Attributes:
        limit: rows that may decode at once; lowered when the device has no room for more.
        seats: the rows that decode, oldest first.
    """

    def __init__(self, max_slots: int) -> None:
        self.limit = max_slots
        self.seats: list[Seat] = []
        # Owners in the order of their turns. The samples of a group that wait for a slot, by job id.
        self._queues: dict[Hashable, deque[int]] = {}
        self._owners: dict[int, Hashable] = {}
        self._unseated: dict[int, deque[int]] = {}

    # ---- waiting --------------------------------------------------------------------------------------------------

    def enqueue(self, job_id: int, owner: Hashable, samples: Sequence[int], *, first: bool = False) -> None:
        """Let ``samples`` of a group wait; ``first`` puts it ahead of its owner's others (a group that sat before)."""
        if job_id in self._unseated:
            self._unseated[job_id] = deque(sorted({*self._unseated[job_id], *samples}))
            return
        self._unseated[job_id] = deque(samples)
        self._owners[job_id] = owner
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

    def num_unseated(self, job_id: int) -> int:
        """Rows of a group that wait."""
        return len(self._unseated.get(job_id, ()))

    @property
    def num_waiting(self) -> int:
        """Rows that wait for a slot."""
        return sum(len(samples) for samples in self._unseated.values())

    # ---- seats ----------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Rows that may still be seated."""
        return max(0, self.limit - len(self.seats))

    def seat(self, job_id: int, most: int) -> list[Seat]:
        """Seat up to ``most`` of a waiting group's rows while there are seats; then it is the next owner's turn."""
        samples = self._unseated[job_id]
        seated = [Seat(job_id, samples.popleft()) for _ in range(min(len(samples), self.num_free, most))]
        self.seats += seated
        owner = self._owners[job_id]
        queue = self._queues.pop(owner)
        if not samples:
            del self._unseated[job_id], self._owners[job_id]
            queue.remove(job_id)
        if queue:
            self._queues[owner] = queue
        return seated

    def seats_of(self, job_id: int) -> list[Seat]:
        """A group's rows that decode."""
        return [seat for seat in self.seats if seat.job_id == job_id]

    def release(self, seat: Seat) -> None:
        """The row has ended."""
        self.seats.remove(seat)

    def remove(self, job_id: int) -> list[Seat]:
        """Forget a group wherever its rows are; those of its rows that decoded. Unknown ids are fine."""
        freed = self.seats_of(job_id)
        self.seats = [seat for seat in self.seats if seat.job_id != job_id]
        if self._unseated.pop(job_id, None) is not None:
            owner = self._owners.pop(job_id)
            self._queues[owner].remove(job_id)
            if not self._queues[owner]:
                del self._queues[owner]
        return freed
