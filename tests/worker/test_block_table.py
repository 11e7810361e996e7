"""``tx.worker.block_table``: who holds what, by example and over random histories."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.block_table import BlockTable, OutOfBlocks


def test_blocks_come_lowest_first_and_go_back():
    table = BlockTable(6)
    table.extend("a", 2)
    table.extend("b", 1)
    table.extend("a", 3)
    assert list(table.held("a")) == [0, 1, 3]
    assert list(table.held("b")) == [2]
    table.release("b")
    table.release("nobody")
    table.extend("c", 2)
    assert list(table.held("c")) == [2, 4]
    assert table.num_held == 5


def test_too_few_blocks_take_nothing():
    table = BlockTable(3)
    table.extend("a", 1)
    with pytest.raises(OutOfBlocks):
        table.extend("b", 3)
    assert table.num_held == 1
    table.extend("b", 2)


def test_shrinking_moves_everyone_to_the_front():
    table = BlockTable(8)
    for holder in "abcd":
        table.extend(holder, 2)
    table.release("a")
    table.release("c")
    old, new = table.resize(5)
    assert (old.tolist(), new.tolist()) == ([2, 3, 6, 7], [0, 1, 2, 3])
    assert list(table.held("d")) == [2, 3]
    with pytest.raises(OutOfBlocks):
        table.resize(3)


def test_growing_moves_nobody():
    table = BlockTable(2)
    table.extend("a", 2)
    old, new = table.resize(4)
    assert (old.tolist(), new.tolist()) == ([0, 1], [0, 1])
    table.extend("a", 4)
    assert list(table.held("a")) == [0, 1, 2, 3]


events = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.integers(0, 4), st.integers(1, 6)),
        st.tuples(st.just("release"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("resize"), st.just(0), st.integers(0, 16)),
    ),
    max_size=50,
)


@given(events=events)
def test_contents_follow_their_holders(events):
    """A pool with the holder's name and place in each block: whatever happens, everyone finds their own."""
    table, pool = BlockTable(4), [None] * 4
    wanted: dict[int, int] = {}
    for event, holder, number in events:
        if event == "extend":
            more = max(number, wanted.get(holder, 0))
            if more - wanted.get(holder, 0) > table.num_blocks - table.num_held:
                with pytest.raises(OutOfBlocks):
                    table.extend(holder, more)
                continue
            table.extend(holder, more)
            wanted[holder] = more
            for place, block in enumerate(table.held(holder)):
                pool[block] = (holder, place)
        elif event == "release":
            table.release(holder)
            wanted.pop(holder, None)
        elif number >= table.num_held:
            old, new = table.resize(number)
            moved = [None] * number
            for source, target in zip(old, new, strict=True):
                moved[target] = pool[source]
            pool = moved
        assert table.num_held == sum(wanted.values())
        for who, count in wanted.items():
            assert [pool[block] for block in table.held(who)] == [(who, place) for place in range(count)]
    assert np.all([len(set(table.held(who))) == count for who, count in wanted.items()])
