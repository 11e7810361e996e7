"""Datums into rows and rows into micro-batches under a token budget. No JAX.

Everything that one model has waiting is planned together. Where rows are packed, each is filled with several datums,
the longest first and every next one where it fits best, until the row is as long as the budget (or as its one datum, if
that is longer); elsewhere a row is one datum, and datums of one padded length share a micro-batch. The plan is a pure
function of its datums and limits, whatever else the server does meanwhile.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tx.worker.shapes import Limits, Shape, max_rows, padded_length, padded_targets, row_budget, rows_for


@dataclass(frozen=True, order=True)
class Piece:
    """One datum on its way: ``length`` positions of ``num_targets`` targets; it is datum ``index`` of job ``job_id``.

    The field order is the sort order: the widest head first, then the longest datums, so that a micro-batch that
    doesn't fit into memory shows at the start of a pass and not at its end.
    """

    num_targets: int
    length: int
    job_id: int
    index: int


type Row = tuple[Piece, ...]
"""What lies in one row, from its first position on, without gaps."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one jitted call. ``shape.rows`` is at least ``len(rows)``: what is missing is padding."""

    rows: tuple[Row, ...]
    shape: Shape

    @property
    def pieces(self) -> list[Piece]:
        """Its datums, row by row."""
        return [piece for row in self.rows for piece in row]

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return sum(piece.length for piece in self.pieces)


def plan(pieces: Iterable[Piece], limits: Limits) -> list[MicroBatch]:
    """All datums in micro-batches, the longest first; each datum appears exactly once.

    Example, a budget of 256: datums of 300, 200, 100, 40 and 20 positions run as rows of 320 = {300, 20}, which is
    longer than the budget because its first datum is, 256 = {200, 40} and 128 = {100}. Not packed, they run as 1 x 384,
    1 x 256, 1 x 128, 1 x 48 and 1 x 24.
    """
    waiting = sorted(pieces, reverse=True)
    return _plan_packed(waiting, limits) if limits.packed else _plan_single(waiting, limits)


def smaller(batch: MicroBatch, limits: Limits) -> Limits | None:
    """Limits under which the datums of this micro-batch take smaller shapes; None if they have the smallest.

    A packed row is never shorter than its longest datum, whatever else lies in it; its number of rows is given.
    """
    shape = batch.shape
    if limits.packed:
        longest = max(piece.length for piece in batch.pieces)
        can_shrink = shape.length > padded_length(longest, limits)
    else:
        can_shrink = shape.rows > limits.row_multiple
    return replace(limits, tokens=shape.num_tokens // 2) if can_shrink else None


# ---- several datums per row -----------------------------------------------------------------------------------------


def _plan_packed(waiting: Sequence[Piece], limits: Limits) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    start = 0
    while start < len(waiting):
        targets = padded_targets(waiting[start].num_targets)
        end = start
        while end < len(waiting) and padded_targets(waiting[end].num_targets) == targets:
            end += 1
        rows = _fill_rows(waiting[start:end], limits)
        for at in range(0, len(rows), limits.row_multiple):
            together = tuple(rows[at : at + limits.row_multiple])
            longest = max(_length(row) for row in together)
            shape = Shape(limits.row_multiple, padded_length(longest, limits), targets)
            batches.append(MicroBatch(together, shape))
        start = end
    return batches


def _fill_rows(pieces: Sequence[Piece], limits: Limits) -> list[Row]:
    """Best fit: each datum into the fullest row that still has room for it; rows come back longest first."""
    budget = row_budget(limits)
    most = max(1, limits.datums // limits.row_multiple) if limits.datums else len(pieces)
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (positions left, row), ascending, of the rows that are not full
    for piece in pieces:
        at = bisect.bisect_left(room, (piece.length, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            # A long datum opens a row as long as its own padded length: what is left of it is not wasted.
            size = max(budget, padded_length(piece.length, limits))
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left > piece.length and len(rows[row]) < most:
            bisect.insort(room, (left - piece.length, row))
    return sorted((tuple(row) for row in rows), key=lambda row: (-_length(row), row[0]))


def _length(row: Row) -> int:
    return sum(piece.length for piece in row)


# ---- one datum per row ----------------------------------------------------------------------------------------------


def _plan_single(waiting: Sequence[Piece], limits: Limits) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    start = 0
    while start < len(waiting):
        first = waiting[start]
        length = padded_length(first.length, limits)
        targets = padded_targets(first.num_targets)
        alike = _count_alike(waiting, start, length, targets, limits)
        num_rows = rows_for(alike, length, limits)
        taken = waiting[start : start + min(alike, num_rows)]
        batches.append(MicroBatch(tuple((piece,) for piece in taken), Shape(num_rows, length, targets)))
        start += len(taken)
    return batches


def _count_alike(waiting: Sequence[Piece], start: int, length: int, targets: int, limits: Limits) -> int:
    """Datums from ``start`` on that belong into this padded length.

    Shorter ones count too, while they fill rows of the shape that would be padding anyway. No more are counted than a
    micro-batch can take.
    """
    same, full = start, max_rows(length, limits)
    while same < len(waiting) and same - start < full and _bucket(waiting[same], limits) == (length, targets):
        same += 1
    room = rows_for(same - start, length, limits) - (same - start)
    end = same
    while end < len(waiting) and end - same < room and padded_targets(waiting[end].num_targets) == targets:
        end += 1
    return end - start


def _bucket(piece: Piece, limits: Limits) -> tuple[int, int]:
    return padded_length(piece.length, limits), padded_targets(piece.num_targets)
