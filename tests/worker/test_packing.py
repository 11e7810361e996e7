"""Packing: each datum exactly once, within its limits, with bounded padding, independent of arrival order."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.packing import MicroBatch, Piece, plan, smaller
from tx.worker.shapes import Limits, Shape, all_shapes, max_rows, padded_length, row_budget

CONTEXT = 1024
PIECES = st.lists(st.tuples(st.integers(1, CONTEXT), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=80).map(
    lambda specs: [Piece(targets, length, index // 3, index % 3) for index, (length, targets) in enumerate(specs)]
)
LIMITS = st.builds(
    Limits,
    st.integers(1, 8192),
    st.sampled_from([0, 0, 1, 3, 16]),
    st.just(CONTEXT),
    st.sampled_from([1, 1, 2, 4, 3]),
    st.booleans(),
)


def pieces_of(lengths: list[int]) -> list[Piece]:
    return [Piece(1, length, 0, index) for index, length in enumerate(lengths)]


def computed(batches: list[MicroBatch]) -> int:
    return sum(batch.shape.num_tokens for batch in batches)


@given(PIECES, LIMITS)
def test_every_datum_runs_once_in_a_shape_that_holds_it(pieces: list[Piece], limits: Limits):
    batches = plan(pieces, limits)
    assert sorted(piece for batch in batches for piece in batch.pieces) == sorted(pieces)
    for batch in batches:
        assert 1 <= len(batch.rows) <= batch.shape.rows
        assert all(len(row) >= 1 for row in batch.rows)
        assert all(sum(piece.length for piece in row) <= batch.shape.length for row in batch.rows)
        assert all(piece.num_targets <= batch.shape.num_targets for piece in batch.pieces)
        assert batch.num_tokens == sum(piece.length for piece in batch.pieces) <= batch.shape.num_tokens
        if not limits.packed:
            assert all(len(row) == 1 for row in batch.rows)


@given(PIECES, LIMITS)
def test_a_micro_batch_keeps_its_limits(pieces: list[Piece], limits: Limits):
    """One row per device runs whatever the budget says: those of a datum that is too long for it."""
    for batch in plan(pieces, limits):
        shape, multiple = batch.shape, limits.row_multiple
        assert shape.rows % multiple == 0
        assert not limits.datums or len(batch.pieces) <= max(limits.datums, multiple)
        if shape.num_tokens > limits.tokens:
            longest = max(piece.length for piece in batch.pieces)
            assert shape.rows == multiple
            assert shape.length == padded_length(longest, limits)


@given(PIECES, LIMITS)
def test_every_shape_is_in_the_list_of_what_may_be_compiled(pieces: list[Piece], limits: Limits):
    known = all_shapes(limits, longest=max(piece.length for piece in pieces))
    met = {(batch.shape.rows, batch.shape.length) for batch in plan(pieces, limits)}
    assert met <= {(shape.rows, shape.length) for shape in known}


@given(PIECES, LIMITS, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_arrival(pieces: list[Piece], limits: Limits, shuffler: random.Random):
    shuffled = list(pieces)
    shuffler.shuffle(shuffled)
    assert plan(shuffled, limits) == plan(pieces, limits)


@given(PIECES, LIMITS)
def test_the_widest_head_runs_first_and_of_its_micro_batches_the_longest(pieces: list[Piece], limits: Limits):
    order = [(batch.shape.num_targets, batch.shape.length) for batch in plan(pieces, limits)]
    assert order == sorted(order, reverse=True)


@given(PIECES, LIMITS)
def test_less_and_less_memory_comes_to_an_end(pieces: list[Piece], limits: Limits):
    """Whatever micro-batch fails again and again, it shrinks each time, down to one datum per device."""
    batch = plan(pieces, limits)[0]
    while (less := smaller(batch, limits)) is not None:
        after = {piece: each for each in plan(pieces, less) for piece in each.pieces}
        assert all(after[piece].shape.num_tokens < batch.shape.num_tokens for piece in batch.pieces)
        limits, batch = less, after[batch.pieces[0]]
    least = padded_length(max(piece.length for piece in batch.pieces), limits) * limits.row_multiple
    assert batch.shape.num_tokens == least


def test_a_long_datum_among_fillers_has_nothing_to_give_up():
    """Its row stays as long as it is, with the fillers or without."""
    limits = Limits(256, 0, CONTEXT)
    (batch,) = plan(pieces_of([300, 12, 8]), limits)
    assert batch.shape == Shape(1, 320, 1)
    assert smaller(batch, limits) is None


# ---- how much is padding --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=80), st.integers(CONTEXT, 8192))
def test_padding_of_packed_rows_is_bounded(lengths: list[int], tokens: int):
    """All rows but the last are more than half full: else what the last one holds would have gone there."""
    batches = plan(pieces_of(lengths), Limits(tokens, 0, CONTEXT))
    assert computed(batches) < 2 * sum(lengths) + CONTEXT


@given(st.lists(st.integers(16, CONTEXT), min_size=1, max_size=80), st.integers(CONTEXT, 8192))
def test_padding_of_single_rows_is_bounded(lengths: list[int], tokens: int):
    """Less than a third of a row is padding, and at most a quarter of a micro-batch's rows."""
    batches = plan(pieces_of(lengths), Limits(tokens, 0, CONTEXT, packed=False))
    assert computed(batches) <= 3 / 2 * sum(lengths) * 4 / 3


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
def test_a_skewed_batch_costs_what_its_tokens_cost(tokens: int, packed: bool):
    """One long datum among many short ones: all padded to the longest would be 32 x 1280, 25 times the real tokens."""
    lengths = [1025, *[20] * 31]
    batches = plan(pieces_of(lengths), Limits(tokens, 0, 8192, packed=packed))
    assert computed(batches) < 1.3 * sum(lengths)
    if not packed:
        assert computed(batches) == 1280 + 32 * 24


@pytest.mark.parametrize(("num_datums", "bound"), [(64, 0.05), (512, 0.02)])
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
def test_padding_of_questions_with_answers(num_datums: int, bound: float, tokens: int):
    """Lengths like GSM8K's (a median of 170 tokens, two thirds within a factor of 1.5): a batch of a step."""
    draw = np.random.default_rng(0).normal(np.log(170), 0.4, num_datums)
    lengths = np.clip(np.exp(draw), 20, 1024).astype(int).tolist()
    assert computed(plan(pieces_of(lengths), Limits(tokens, 0, 8192))) * (1 - bound) <= sum(lengths)
    assert computed(plan(pieces_of(lengths), Limits(tokens, 0, 8192, packed=False))) * (1 - 0.3) <= sum(lengths)


def test_a_budget_that_is_no_length_isnt_exceeded():
    """1,000 positions would be padded to 1,024: rows are filled to 896 instead."""
    batches = plan(pieces_of([100] * 20), Limits(1000, 0, 8192))
    assert [(len(batch.pieces), batch.shape) for batch in batches] == [
        (8, Shape(1, 896, 1)),
        (8, Shape(1, 896, 1)),
        (4, Shape(1, 448, 1)),
    ]


# ---- how much work it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["all alike", "many lengths"])
def test_planning_is_not_quadratic(packed: bool, kind: str):
    """Calls, of Python and C functions alike, grow with the datums; a tenth are for the logarithm."""

    def calls(count: int) -> int:
        rng = random.Random(0)
        lengths = [1000 if kind == "all alike" else rng.randint(1, CONTEXT) for _ in range(count)]
        pieces, limits, seen = pieces_of(lengths), Limits(2048, 0, CONTEXT, packed=packed), 0

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            plan(pieces, limits)
        finally:
            sys.setprofile(None)
        return seen

    assert calls(4_000) <= 9 * calls(500)


# ---- examples -------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_docstring():
    pieces = pieces_of([300, 200, 100, 40, 20])
    packed = [
        (batch.shape, [[p.length for p in row] for row in batch.rows]) for batch in plan(pieces, Limits(256, 0, 512))
    ]
    assert packed == [
        (Shape(1, 320, 1), [[300, 20]]),
        (Shape(1, 256, 1), [[200, 40]]),
        (Shape(1, 128, 1), [[100]]),
    ]
    single = [batch.shape for batch in plan(pieces, Limits(256, 0, 512, packed=False))]
    assert single == [Shape(1, 384, 1), Shape(1, 256, 1), Shape(1, 128, 1), Shape(1, 48, 1), Shape(1, 24, 1)]


def test_datums_are_found_again_where_they_were_laid():
    """``rows`` say where each datum lies: row by row, one behind the other, missing rows last."""
    (batch,) = plan(pieces_of([5, 3, 2, 6]), Limits(64, 0, CONTEXT, row_multiple=4))
    assert [[(p.index, p.length) for p in row] for row in batch.rows] == [[(3, 6), (0, 5), (1, 3), (2, 2)]]
    assert batch.shape == Shape(4, 16, 1)


def test_rows_of_data_parallel_devices_share_a_micro_batch():
    (batch,) = plan(pieces_of([100] * 6), Limits(1024, 0, CONTEXT, row_multiple=4))
    assert batch.shape == Shape(4, 224, 1)
    assert sorted(len(row) for row in batch.rows) == [2, 2, 2]


def test_a_cap_on_datums_holds_for_packed_rows():
    batches = plan(pieces_of([10] * 10), Limits(1024, 3, CONTEXT))
    assert [len(batch.pieces) for batch in batches] == [3, 3, 3, 1]
    batches = plan(pieces_of([10] * 10), Limits(1024, 4, CONTEXT, row_multiple=2))
    assert [len(batch.pieces) for batch in batches] == [4, 4, 2]


def test_datums_with_many_targets_are_not_mixed_with_others():
    pieces = [Piece(1, 10, 0, 0), Piece(5, 20, 0, 1), Piece(8, 10, 0, 2)]
    assert [(batch.shape, len(batch.pieces)) for batch in plan(pieces, Limits(1024, 0, CONTEXT))] == [
        (Shape(1, 32, 8), 2),
        (Shape(1, 16, 1), 1),
    ]


@given(LIMITS)
def test_a_full_micro_batch_is_what_the_limits_allow(limits: Limits):
    """Enough datums of one length fill rows to the budget, packed, or the most rows, not packed."""
    batches = plan(pieces_of([50] * 200), limits)
    if limits.packed and not limits.datums:
        assert len(batches[0].rows[0]) == max(1, row_budget(limits) // 50)
    elif not limits.packed:
        assert batches[0].shape == Shape(max_rows(64, limits), 64, 1)
