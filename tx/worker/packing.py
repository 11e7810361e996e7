"""Rows into micro-batches under a token budget. No JAX.

Rows of everything that one model has waiting are sorted by length, so that each micro-batch holds rows of one padded
length; the plan of a pass is a pure function of its rows and limits, whatever else the server does meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tx.worker.shapes import Limits, Shape, padded_length, padded_targets, rows_for


@dataclass(frozen=True, order=True)
class Row:
    """One datum on its way: ``length`` positions of ``num_targets`` targets; it is datum ``index`` of job ``job_id``.

    The field order is the sort order: the widest head first, then the longest rows, so that a micro-batch that doesn't
    fit into memory shows at the start of a pass and not at its end.
    """

    num_targets: int
    length: int
    job_id: int
    index: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one jitted call. ``shape.rows`` is at least ``len(rows)``: what is missing is padding."""

    rows: tuple[Row, ...]
    shape: Shape


def plan(rows: Iterable[Row], limits: Limits) -> list[MicroBatch]:
    """All rows in micro-batches, the longest first; each row appears exactly once.

    Example: rows of 100, 90, 20, 17 and 5 positions with a budget of 256 tokens run as 1 x 128, 1 x 96, {20, 17} as
    2 x 24 and 1 x 16.
    """
    waiting = sorted(rows, reverse=True)
    batches: list[MicroBatch] = []
    start = 0
    while start < len(waiting):
        first = waiting[start]
        length = padded_length(first.length, limits.max_context)
        targets = padded_targets(first.num_targets)
        alike = _count_alike(waiting, start, length, targets, limits)
        num_rows = rows_for(alike, length, limits)
        taken = tuple(waiting[start : start + min(alike, num_rows)])
        batches.append(MicroBatch(taken, Shape(num_rows, length, targets)))
        start += len(taken)
    return batches


def _count_alike(waiting: list[Row], start: int, length: int, targets: int, limits: Limits) -> int:
    """Rows from ``start`` on that belong into this padded length.

    Shorter rows count too, while they fill rows of the shape that would be padding anyway.
    """
    same = start
    while same < len(waiting) and _bucket(waiting[same], limits) == (length, targets):
        same += 1
    room = rows_for(same - start, length, limits) - (same - start)
    end = same
    while end < len(waiting) and end - same < room and padded_targets(waiting[end].num_targets) == targets:
        end += 1
    return end - start


def _bucket(row: Row, limits: Limits) -> tuple[int, int]:
    return padded_length(row.length, limits.max_context), padded_targets(row.num_targets)
