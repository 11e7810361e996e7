"""Shapes: every row fits, padding is bounded, the set is small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.shapes import Limits, lengths, max_rows, padded_length, power_of_two, rows_for


@given(st.integers(1, 2**20))
def test_power_of_two_is_the_smallest_that_is_enough(value):
    power = power_of_two(value)
    assert power >= value
    assert power & (power - 1) == 0
    assert power == 1 or power // 2 < value


@given(st.integers(1, 40_960), st.sampled_from([1, 20, 512, 8192, 40_960]))
def test_padded_length_holds_the_row_and_wastes_less_than_half_of_it(length, max_context):
    if length > max_context:
        with pytest.raises(ValueError, match="context"):
            padded_length(length, max_context)
        return
    padded = padded_length(length, max_context)
    assert length <= padded <= max_context
    assert padded in list(lengths(max_context))
    assert padded <= 16 or padded < 1.5 * length + 1


def test_the_lengths_are_few():
    assert list(lengths(100)) == [16, 24, 32, 48, 64, 96, 100]
    assert len(list(lengths(32_768))) == 23


@given(st.integers(1, 500), st.integers(16, 1024), st.integers(1, 8192), st.integers(0, 70), st.sampled_from([1, 2, 8]))
def test_rows_respect_budget_cap_and_mesh(waiting, length, tokens, cap, multiple):
    limits = Limits(tokens, cap, 1024, multiple)
    full, rows = max_rows(length, limits), rows_for(waiting, length, limits)
    assert rows <= full
    assert rows % multiple == 0
    assert power_of_two(rows // multiple) == rows // multiple
    assert full == multiple or (full * length <= tokens and (not cap or full <= cap))
    assert rows == multiple or waiting >= rows * 3 / 4
