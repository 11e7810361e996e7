"""Who holds which block of the KV pool. Host book-keeping only, no JAX.

A *holder* is a row that decodes. Blocks come from one free list, lowest numbers first, so that those in use stay near
the start and the pool can shrink to a prefix after ``compact``. The pool itself is the caller's; when it must grow or
may shrink, the caller resizes both.

Not here: prompts that are only remembered (``prefill`` keeps them outside the pool).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

import numpy as np


class OutOfBlocks(Exception):
    """The pool has too few free blocks; nothing was taken."""


class BlockTable:
    """Blocks by holder.

    Attributes:
        num_blocks: size of the pool.
    """

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._held: dict[Hashable, list[int]] = {}

    @property
    def num_held(self) -> int:
        """Blocks in use."""
        return self.num_blocks - len(self._free)

    def held(self, holder: Hashable) -> Sequence[int]:
        """A holder's blocks in the order of its positions."""
        return self._held.get(holder, ())

    def extend(self, holder: Hashable, num_blocks: int) -> None:
        """Let a holder have ``num_blocks`` blocks in all; OutOfBlocks if there are too few."""
        blocks = self._held.setdefault(holder, [])
        missing = num_blocks - len(blocks)
        if missing > len(self._free):
            raise OutOfBlocks(f"{missing} blocks wanted, {len(self._free)} free")
        blocks.extend(heapq.heappop(self._free) for _ in range(missing))

    def release(self, holder: Hashable) -> None:
        """Give a holder's blocks back; unknown holders are fine."""
        for block in self._held.pop(holder, ()):
            heapq.heappush(self._free, block)

    def resize(self, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Another size of pool, at least the blocks in use.

        Returns:
            the blocks in use by their old and by their new numbers. Growing moves nothing; shrinking moves every holder
            to the front: holders of blocks [7, 2] and [4] end up with [0, 1] and [2].
        """
        if num_blocks < self.num_held:
            raise OutOfBlocks(f"{self.num_held} blocks in use don't fit in {num_blocks}")
        old = [block for blocks in self._held.values() for block in blocks]
        new = old if num_blocks >= self.num_blocks else list(range(len(old)))
        moved = iter(new)
        self._held = {holder: [next(moved) for _ in blocks] for holder, blocks in self._held.items()}
        self.num_blocks = num_blocks
        taken = set(new)
        self._free = [block for block in range(num_blocks) if block not in taken]
        return np.asarray(old, np.int32), np.asarray(new, np.int32)
