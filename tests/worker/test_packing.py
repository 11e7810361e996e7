"""Packing: each row exactly once, within its limits, with bounded padding, independent of arrival order."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tx.worker.packing import Row, plan
from tx.worker.shapes import Limits, Shape, max_rows

ROWS = st.lists(st.tuples(st.integers(1, 1024), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=80).map(
    lambda specs: [Row(targets, length, index // 3, index % 3) for index, (length, targets) in enumerate(specs)]
)
LIMITS = st.builds(
    Limits, st.integers(1, 8192), st.sampled_from([0, 0, 1, 3, 16]), st.just(1024), st.sampled_from([1, 1, 4])
)


@given(ROWS, LIMITS)
def test_every_row_runs_once_in_a_shape_that_holds_it(rows, limits):
    batches = plan(rows, limits)
    assert sorted(row for batch in batches for row in batch.rows) == sorted(rows)
    for batch in batches:
        assert 1 <= len(batch.rows) <= batch.shape.rows <= max_rows(batch.shape.length, limits)
        assert all(row.length <= batch.shape.length for row in batch.rows)
        assert all(row.num_targets <= batch.shape.num_targets for row in batch.rows)


@given(ROWS, LIMITS, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_arrival(rows, limits, shuffler: random.Random):
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert plan(shuffled, limits) == plan(rows, limits)


@given(st.lists(st.integers(16, 1024), min_size=1, max_size=80), st.integers(1024, 8192))
def test_padding_stays_below_twice_the_real_tokens(lengths, tokens):
    batches = plan([Row(1, length, 0, i) for i, length in enumerate(lengths)], Limits(tokens, 0, 1024))
    computed = sum(batch.shape.num_tokens for batch in batches)
    assert computed <= 2.01 * sum(lengths) + 16


def test_a_skewed_batch_costs_what_its_tokens_cost():
    """One long row among many short ones: padding everything to the longest would compute 32 x 1024 positions."""
    rows = [Row(1, 1000, 0, 0), *(Row(1, 20, 0, i) for i in range(1, 32))]
    assert sum(batch.shape.num_tokens for batch in plan(rows, Limits(2048, 0, 1024))) <= 1024 + 32 * 24


def test_the_worked_example_of_the_docstring():
    rows = [Row(1, length, 0, i) for i, length in enumerate((100, 90, 20, 17, 5))]
    shapes = [batch.shape for batch in plan(rows, Limits(256, 0, 512))]
    assert shapes == [Shape(1, 128, 1), Shape(1, 96, 1), Shape(2, 24, 1), Shape(1, 16, 1)]
