"""The small fixed set of padded shapes that training programs are compiled for. No JAX.

Packed rows are 16, 32, 64, 128 positions long and from there on in steps of a quarter (160, 192, 224, 256, 320, …): 28
lengths up to 8,192, four more for each doubling, each of them one shape. A row that is not the pass's last is full; the
last one, or the only one of a small request, wastes less than a fifth of it, or half where it takes no time anyway.

A row of one datum is 16, 24, 32, 48, … positions long, from 512 on in steps of a quarter, and wastes less than a third;
there is a shape for each power of two of rows under the token budget. Everything else a program could depend on (which
loss, its config, learning rates) is data, not shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SHORTEST = 16
"""Shorter rows are padded to this many positions: their programs would save nothing."""

_QUARTERS_FROM = 128
_QUARTERS_FROM_NOT_PACKED = 512
"""Positions from which on lengths grow in steps of a quarter."""


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
        datums: cap on the datums of a micro-batch, 0 is off; ``row_multiple`` of them run in any case.
        max_context: longest datum there can be.
        row_multiple: rows are multiples of this, so that they divide over the mesh.
        packed: several datums per row, kept apart by the attention; else one datum per row.
    """

    tokens: int
    datums: int
    max_context: int
    row_multiple: int = 1
    packed: bool = True


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


def padded_rank(rank: int) -> int:
    """Columns of a dense site's arrays: a power of two, at least 2.

    A product with one column is a matrix-vector product, which XLA computes far slower on a CPU than one with two (a
    layer of SmolLM2 takes a tenth longer).
    """
    return power_of_two(max(2, rank))


def lengths(limits: Limits) -> Iterator[int]:
    """Every padded length, ascending; the last is ``max_context`` itself, all others are multiples of 8.

    Attention asks for none of it: cuDNN takes any length as long as there is no bias, the blocks of packed rows too.
    """
    length = SHORTEST
    while length < limits.max_context:
        yield length
        length += _step(length, limits.packed)
    yield limits.max_context


def _step(length: int, packed: bool) -> int:
    """To the next length: a quarter of the power of two below; of short rows half of it or, packed, all of it."""
    below = 1 << (length.bit_length() - 1)
    if packed:
        return below if below < _QUARTERS_FROM else below // 4
    return below // 2 if below < _QUARTERS_FROM_NOT_PACKED else below // 4


def padded_length(length: int, limits: Limits) -> int:
    """The smallest padded length that holds ``length`` positions.

    Example: 70 positions become 128, or 96 not packed; 300 become 320, or 384 not packed; 1,025 become 1,280; in a
    context of 9,000, 8,500 become 9,000.
    """
    if length > limits.max_context:
        raise ValueError(f"a row of {length} positions in a context of {limits.max_context}")
    return next(padded for padded in lengths(limits) if padded >= length)


def row_budget(limits: Limits) -> int:
    """Positions up to which a packed row is filled: the longest padded length of which the rows fit the budget.

    Example: of 3,000 tokens, one row takes 2,560 and two rows take 1,280 each.
    """
    each = limits.tokens // limits.row_multiple
    return max((length for length in lengths(limits) if length <= each), default=next(lengths(limits)))


def max_rows(length: int, limits: Limits) -> int:
    """Rows of a full micro-batch at this padded length: a power of two times ``row_multiple``, at least one of it."""
    rows = max(1, limits.tokens // length)
    if limits.datums and not limits.packed:
        rows = min(rows, limits.datums)
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


def all_shapes(limits: Limits, longest: int) -> list[Shape]:
    """Every shape that datums of up to ``longest`` positions with one target each can meet: what may be compiled."""
    found = []
    longest = padded_length(min(longest, limits.max_context), limits)
    if limits.packed:
        longest = max(longest, row_budget(limits))
    for length in lengths(limits):
        if limits.packed:
            found.append(Shape(limits.row_multiple, length, 1))
        else:
            full = max_rows(length, limits)
            rows = limits.row_multiple
            while rows <= full:
                found.append(Shape(rows, length, 1))
                rows *= 2
        if length == longest:
            break
    return found
