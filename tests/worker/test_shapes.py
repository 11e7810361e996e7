"""Shapes: every row fits, padding is bounded, the set is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.shapes import (
    SHORTEST,
    Limits,
    Shape,
    all_shapes,
    lengths,
    max_rows,
    padded_length,
    padded_targets,
    power_of_two,
    row_budget,
    rows_for,
)


@given(st.integers(1, 2**20))
def test_power_of_two_is_the_smallest_that_is_enough(value: int):
    power = power_of_two(value)
    assert power >= value
    assert power & (power - 1) == 0
    assert power == 1 or power // 2 < value
    assert padded_targets(value) == power


def context(max_context: int, packed: bool = True) -> Limits:
    return Limits(512, 0, max_context, packed=packed)


@given(st.integers(1, 40_960), st.sampled_from([1, 20, 512, 8192, 40_960]), st.booleans())
def test_padded_length_is_the_smallest_that_holds_the_row(length: int, max_context: int, packed: bool):
    limits = context(max_context, packed)
    if length > max_context:
        with pytest.raises(ValueError, match="context"):
            padded_length(length, limits)
        return
    padded, known = padded_length(length, limits), list(lengths(limits))
    assert length <= padded <= max_context
    assert padded in known
    assert not [other for other in known if length <= other < padded]


@given(st.integers(SHORTEST, 100_000))
def test_padding_of_a_row(length: int):
    """Half of a packed row of up to 128 at most, a fifth of longer ones; of one datum a third up to 512."""
    waste = 1 - length / padded_length(length, context(200_000))
    assert waste < (1 / 2 if length <= 128 else 1 / 5)
    waste = 1 - length / padded_length(length, context(200_000, packed=False))
    assert waste < (1 / 3 if length <= 512 else 1 / 5)


def test_the_lengths_are_few():
    assert list(lengths(context(100))) == [16, 32, 64, 100]
    assert list(lengths(context(100, packed=False))) == [16, 24, 32, 48, 64, 96, 100]
    long = [512, 640, 768, 896, 1024, 1280, 1300]
    assert list(lengths(context(1300))) == [16, 32, 64, 128, 160, 192, 224, 256, 320, 384, 448, *long]
    assert list(lengths(context(1300, packed=False))) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, *long]
    assert list(lengths(context(10))) == [10]
    for packed, counts in ((True, [28, 32, 36]), (False, [27, 31, 35])):
        assert [len(list(lengths(context(most, packed)))) for most in (8_192, 16_384, 32_768)] == counts
        assert not [length for length in lengths(context(32_768, packed)) if length % 8]


def test_the_worked_examples_of_the_docstrings():
    assert [padded_length(length, context(9000)) for length in (70, 300, 1025, 8500)] == [128, 320, 1280, 9000]
    assert [padded_length(length, context(9000, packed=False)) for length in (70, 300)] == [96, 384]
    limits = Limits(64 * 8, 0, 1024, packed=False)
    assert max_rows(64, limits) == 8
    assert rows_for(7, 64, limits) == 8
    assert rows_for(5, 64, limits) == 4
    assert rows_for(1, 64, limits) == 1
    assert row_budget(Limits(3000, 0, 8192)) == 2560
    assert row_budget(Limits(3000, 0, 8192, row_multiple=2)) == 1280


@given(st.integers(1, 500), st.integers(16, 1024), st.integers(1, 8192), st.integers(0, 70), st.sampled_from([1, 2, 8]))
def test_rows_respect_budget_cap_and_mesh(waiting: int, length: int, tokens: int, cap: int, multiple: int):
    limits = Limits(tokens, cap, 1024, multiple, packed=False)
    full, rows = max_rows(length, limits), rows_for(waiting, length, limits)
    assert rows <= full
    assert rows % multiple == 0
    assert power_of_two(rows // multiple) == rows // multiple
    assert full == multiple or (full * length <= tokens and (not cap or full <= cap))
    assert rows == multiple or waiting >= rows * 3 / 4


@given(st.integers(1, 10_000), st.sampled_from([10, 500, 8192]), st.sampled_from([1, 2, 3, 8]))
def test_a_row_is_filled_to_a_padded_length_within_the_budget(tokens: int, max_context: int, multiple: int):
    limits = Limits(tokens, 0, max_context, multiple)
    budget = row_budget(limits)
    assert padded_length(budget, limits) == budget
    assert budget * multiple <= tokens or budget == min(SHORTEST, max_context)
    longer = [length for length in lengths(limits) if length > budget]
    assert not longer or longer[0] * multiple > tokens


def test_the_number_of_programs():
    """Packed, one per length up to the budget or the longest datum; else one per power of two of rows as well."""
    packed = all_shapes(Limits(2048, 0, 8192), longest=2048)
    assert packed == [Shape(1, length, 1) for length in list(lengths(context(8192)))[:20]]
    assert len(all_shapes(Limits(2048, 0, 8192), longest=20_000)) == 28
    assert {shape.rows for shape in all_shapes(Limits(2048, 0, 8192, row_multiple=8), longest=64)} == {8}
    assert [shape.length for shape in all_shapes(Limits(2048, 0, 8192, row_multiple=8), longest=64)] == [
        16, 32, 64, 128, 160, 192, 224, 256,
    ]  # fmt: skip
    single = all_shapes(Limits(256, 0, 8192, packed=False), longest=256)
    assert single == [
        Shape(rows, length, 1)
        for length, most in ((16, 16), (24, 8), (32, 8), (48, 4), (64, 4), (96, 2), (128, 2), (192, 1), (256, 1))
        for rows in (1, 2, 4, 8, 16)
        if rows <= most
    ]
    assert max(shape.length for shape in all_shapes(Limits(8192, 0, 8192, packed=False), longest=100)) == 128


def test_the_numbers_of_programs_in_the_guide():
    """Of the default budgets: 512 tokens on a CPU, 8,192 on a GPU, in a context of Qwen3's."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "training.md").read_text()
    cpu, gpu = Limits(512, 0, 40_960), Limits(8192, 0, 40_960, packed=False)
    assert len(all_shapes(cpu, longest=512)) == 12
    assert "requests meet twelve shapes per padded rank" in guide
    assert f"datums of up to 8,192 tokens {len(all_shapes(cpu, longest=8192)) - 12} more" in guide
    assert f"up to {len(all_shapes(gpu, longest=8192))} shapes of rows × length" in guide
