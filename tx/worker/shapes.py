"""The small fixed set of padded shapes that training programs are compiled for. No JAX.

Lengths are 16, 24, 32, 48, 64, … (powers of two and one and a half times them): a row is padded by less than half of
itself, and a context of 32,768 has 23 lengths. Rows of one length are powers of two under a token budget. Everything
else a program could depend on (which loss, its config, learning rates) is data, not shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SHORTEST = 16
"""Shorter rows are padded to this many positions: their programs would save nothing."""


@dataclass(frozen=True)
class Shape:
    """One training micro-batch, padded: ``rows`` x ``length`` positions with ``num_targets`` targets each."""

    rows: int
    length: int
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """Positions computed, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Limits:
    """What bounds a micro-batch.

    Attributes:
        tokens: budget of padded positions; a single row longer than it still runs, alone.
        rows: cap on rows, 0 is off.
        max_context: longest row there can be.
        row_multiple: rows are multiples of this, so that they divide over the mesh.
    """

    tokens: int
    rows: int
    max_context: int
    row_multiple: int = 1


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


def lengths(max_context: int) -> Iterator[int]:
    """Every padded length, ascending; the last is ``max_context`` itself."""
    length = SHORTEST
    while length < max_context:
        yield length
        if length + length // 2 < max_context:
            yield length + length // 2
        length *= 2
    yield max_context


def padded_length(length: int, max_context: int) -> int:
    """The smallest padded length that holds ``length`` positions.

    Example: 70 positions become 96, 100 become 128; with a context of 40,960, 33,000 become 40,960.
    """
    if length > max_context:
        raise ValueError(f"a row of {length} positions in a context of {max_context}")
    upper = max(SHORTEST, power_of_two(length))
    middle = upper // 2 + upper // 4
    padded = middle if middle > SHORTEST and length <= middle else upper
    return min(padded, max_context)


def max_rows(length: int, limits: Limits) -> int:
    """Rows of a full micro-batch at this padded length: a power of two times ``row_multiple``, at least one of it."""
    rows = max(1, limits.tokens // length)
    if limits.rows:
        rows = min(rows, limits.rows)
    multiples = max(1, rows // limits.row_multiple)
    return limits.row_multiple * (power_of_two(multiples + 1) // 2)


def rows_for(waiting: int, length: int, limits: Limits) -> int:
    """How many rows the next micro-batch of this length is compiled for when ``waiting`` rows want to run.

    A remainder is padded up when that wastes at most a quarter of the rows, else its largest full power of two runs
    first. Example: of 7 waiting rows with room for 8, all run in 8; of 5, four run in 4 and then one in 1.
    """
    full = max_rows(length, limits)
    if waiting >= full:
        return full
    upper = limits.row_multiple * power_of_two(-(-waiting // limits.row_multiple))
    if upper == limits.row_multiple or waiting >= upper * 3 / 4:
        return upper
    return upper // 2


def padded_targets(num_targets: int) -> int:
    """Targets per position, padded to a power of two."""
    return power_of_two(num_targets)
