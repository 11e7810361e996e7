"""``tx.worker.decode_slots``: buckets, turns and seats, with property tests over random histories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.decode_slots import (
    DecodeSlots,
    Seat,
    bucket_cache_length,
    bucket_prefill_length,
    bucket_rows,
    choose_size,
)


@given(rows=st.integers(1, 300), limit=st.integers(1, 300))
def test_row_buckets_hold_the_rows_and_are_few(rows, limit):
    rows = min(rows, limit)
    size = bucket_rows(rows, limit)
    assert rows <= size <= limit
    assert len({bucket_rows(count, limit) for count in range(1, limit + 1)}) <= 9


@given(length=st.integers(1, 40960), limit=st.integers(32, 40960))
def test_length_buckets_hold_the_length_and_waste_little(length, limit):
    length = min(length, limit)
    assert length <= bucket_cache_length(length, limit) <= limit
    size = bucket_prefill_length(length, limit)
    assert length <= size <= limit
    assert size < 1.5 * length or size == 32
    # A prefilled prompt always fits the cache of a row that has at least one more position than it.
    if length < limit:
        assert size <= bucket_cache_length(length + 1, limit)


def test_buckets_by_example():
    assert [bucket_rows(rows, 16) for rows in (1, 2, 5, 9, 16)] == [1, 4, 8, 16, 16]
    assert [bucket_cache_length(length, 1000) for length in (1, 256, 257, 900)] == [256, 256, 512, 1000]
    assert [bucket_prefill_length(length, 400) for length in (1, 33, 65, 97, 300, 390)] == [32, 48, 96, 128, 384, 400]


def test_the_cache_grows_at_once_and_shrinks_only_when_it_pays():
    assert choose_size((8, 256), (16, 256), set()) == (16, 256)
    assert choose_size((8, 512), (16, 256), set()) == (16, 512)
    assert choose_size((16, 512), (8, 512), set()) == (16, 512)
    assert choose_size((16, 512), (8, 512), {(8, 512)}) == (8, 512)
    assert choose_size((16, 512), (4, 256), {(8, 512)}) == (4, 256)
    assert choose_size((8, 512), (8, 256), {(4, 256), (16, 256)}) == (8, 512)


def test_owners_take_turns():
    slots = DecodeSlots(4)
    slots.resize(4)
    for job in (1, 2, 3):
        slots.enqueue(job, "many", range(1))
    slots.enqueue(9, "few", range(1))
    assert list(slots.in_turn()) == [1, 9, 2, 3]
    order = []
    while (job := slots.head()) is not None:
        order.append(job)
        slots.seat(job)
    assert order == [1, 9, 2, 3]


def test_a_large_group_is_seated_in_parts_and_does_not_block_others():
    slots = DecodeSlots(4)
    slots.resize(4)
    slots.enqueue(1, "a", range(6))
    slots.enqueue(2, "b", range(1))
    assert [seat.sample for _, seat in slots.seat(1)] == [0, 1, 2, 3]
    assert slots.num_free == 0
    assert slots.num_waiting == 3
    slots.release(2)
    assert slots.head() == 2
    assert slots.seat(2) == [(2, Seat(2, 0))]
    slots.release(0)
    slots.release(1)
    assert slots.seat(slots.head()) == [(0, Seat(1, 4)), (1, Seat(1, 5))]
    assert slots.head() is None


def test_shrinking_moves_rows_together():
    slots = DecodeSlots(8)
    slots.resize(4)
    slots.enqueue(1, None, range(4))
    slots.seat(1)
    slots.release(1)
    slots.release(3)
    assert slots.resize(2) == [0, 2]
    assert slots.seats == [Seat(1, 0), Seat(1, 2)]
    assert slots.resize(4) == [0, 1, -1, -1]
    with pytest.raises(ValueError, match="live rows"):
        slots.resize(1)


def test_a_returned_group_goes_first_and_keeps_its_other_samples():
    slots = DecodeSlots(2)
    slots.resize(2)
    slots.enqueue(1, None, range(3))
    slots.seat(1)
    slots.enqueue(2, None, range(1))
    slots.release(0)
    slots.release(1)
    slots.enqueue(1, None, [0, 1], first=True)
    assert slots.head() == 1
    assert [seat.sample for _, seat in slots.seat(1)] == [0, 1]


events = st.lists(
    st.one_of(
        st.tuples(st.just("enqueue"), st.sampled_from("abc"), st.integers(1, 7)),
        st.tuples(st.just("seat")),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
        st.tuples(st.just("resize"), st.integers(0, 6)),
    ),
    max_size=60,
)


@given(events=events, limit=st.integers(1, 6))
def test_every_row_is_somewhere_exactly_once(events, limit):
    slots = DecodeSlots(limit)
    rows: dict[int, set[int]] = {}  # rows of a group that have neither ended nor been removed
    owners = {}
    for job, (event, *details) in enumerate(events):
        if event == "enqueue":
            owners[job], rows[job] = details[0], set(range(details[1]))
            slots.enqueue(job, details[0], range(details[1]))
        elif event == "seat":
            head = slots.head()
            if head is None:
                continue
            assert head == next(slots.in_turn())
            seated = slots.seat(head)
            assert all(slots.seats[slot] == seat for slot, seat in seated)
            waiting_owners = {owners[waiting] for waiting in slots.in_turn()}
            if seated and len(waiting_owners) > 1:
                assert owners[slots.head()] != owners[head]
        elif event == "release" and details[0] < len(slots.seats) and slots.seats[details[0]]:
            seat = slots.seats[details[0]]
            rows[seat.job_id].discard(seat.sample)
            slots.release(details[0])
        elif event == "remove":
            slots.remove(details[0])
            rows.pop(details[0], None)
        elif event == "resize" and details[0] >= slots.num_live:
            before = list(slots.seats)
            sources = slots.resize(details[0])
            assert slots.seats == [before[old] if old >= 0 else None for old in sources]
        live = [(seat.job_id, seat.sample) for _, seat in slots.live()]
        assert len(live) == len(set(live)) <= limit
        assert slots.num_live + slots.num_waiting == sum(len(samples) for samples in rows.values())
        assert all(sample in rows[job_id] for job_id, sample in live)
        waiting = set(slots.in_turn())
        assert waiting | {job_id for job_id, _ in live} == {job_id for job_id, left in rows.items() if left}
