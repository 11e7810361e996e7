"""``tx.worker.decode_slots``: buckets, turns and seats, with property tests over random histories."""

from hypothesis import given
from hypothesis import strategies as st

from tx.worker.decode_slots import (
    COMPILE_S,
    ROW_BUCKETS,
    DecodeSlots,
    Seat,
    Sizes,
    bucket_blocks,
    bucket_prefill_length,
    bucket_rows,
)


@given(rows=st.integers(1, 300), limit=st.integers(1, 300))
def test_row_buckets_hold_the_rows_and_are_few(rows, limit):
    rows = min(rows, limit)
    size = bucket_rows(rows, limit)
    assert rows <= size <= limit
    assert len({bucket_rows(count, limit) for count in range(1, limit + 1)}) <= 9


@given(length=st.integers(1, 40960), limit=st.integers(32, 40960))
def test_prefill_lengths_hold_the_prompt_and_waste_little(length, limit):
    length = min(length, limit)
    size = bucket_prefill_length(length, limit)
    assert length <= size <= limit
    assert size < 1.5 * length or size == 32


@given(blocks=st.integers(1, 5000), rows=st.sampled_from(ROW_BUCKETS), limit=st.integers(8, 5000))
def test_pools_hold_the_blocks(blocks, rows, limit):
    blocks = min(blocks, limit)
    size = bucket_blocks(blocks, rows, limit)
    assert blocks <= size <= limit
    assert size <= max(2 * blocks, 4 * rows)


def test_buckets_by_example():
    assert [bucket_rows(rows, 16) for rows in (1, 2, 5, 9, 16)] == [1, 4, 8, 16, 16]
    assert [bucket_blocks(blocks, 8, 200) for blocks in (1, 32, 33, 150)] == [32, 32, 64, 200]
    assert [bucket_prefill_length(length, 400) for length in (1, 33, 65, 97, 300, 390)] == [32, 48, 96, 128, 384, 400]


def test_a_new_size_is_compiled_once_the_known_one_has_wasted_as_much():
    sizes = Sizes()
    assert sizes.choose((16, 64), 8) == (16, 64)  # nothing else is there
    sizes.note((16, 64), 9.0)  # it compiled
    assert sizes.step_s == {(16, 64): 0.0}
    sizes.note((16, 64), 0.1)
    assert sizes.choose((32, 128), 8) == (32, 128)  # nothing that is there is large enough
    wasted_each = 8 * 0.1 * (1 - 4 / 16) * 0.7
    enough = next(n for n in range(1, 100) if n * wasted_each >= COMPILE_S)
    assert [sizes.choose((4, 16), 8) for _ in range(enough - 1)] == [(16, 64)] * (enough - 1)
    assert sizes.choose((4, 16), 8) == (4, 16)
    sizes.note((4, 16), 5.0)
    assert sizes.choose((4, 16), 8) == (4, 16)
    assert sizes.choose((1, 4), 8) == (4, 16)
    assert sizes.choose((4, 32), 8) == (16, 64)  # more blocks than (4, 16) has


def test_sizes_that_were_compiled_ahead_are_used():
    sizes = Sizes()
    sizes.note((16, 64), 9.0)
    sizes.note((16, 64), 0.1)
    for size in ((4, 16), (16, 64), (64, 256)):
        sizes.expect(size)
    assert sizes.step_s == {(4, 16): 0.0, (16, 64): 0.1, (64, 256): 0.0}
    assert sizes.choose((4, 16), 8) == (4, 16)
    assert sizes.choose((8, 32), 8) == (16, 64)  # and not a larger one of which nothing is known
    sizes.note((4, 16), 0.05)  # its first run compiled nothing
    assert sizes.step_s[4, 16] == 0.05


def test_owners_take_turns():
    slots = DecodeSlots(4)
    for job in (1, 2, 3):
        slots.enqueue(job, "many", range(1))
    slots.enqueue(9, "few", range(1))
    assert list(slots.in_turn()) == [1, 9, 2, 3]
    order = []
    while (job := slots.head()) is not None:
        order.append(job)
        slots.seat(job, 4)
    assert order == [1, 9, 2, 3]


def test_a_large_group_is_seated_in_parts_and_does_not_block_others():
    slots = DecodeSlots(4)
    slots.enqueue(1, "a", range(6))
    slots.enqueue(2, "b", range(1))
    assert [seat.sample for seat in slots.seat(1, 9)] == [0, 1, 2, 3]
    assert slots.num_free == 0
    assert (slots.num_waiting, slots.num_unseated(1)) == (3, 2)
    slots.release(Seat(1, 2))
    assert slots.head() == 2
    assert slots.seat(2, 9) == [Seat(2, 0)]
    slots.release(Seat(1, 0))
    slots.release(Seat(1, 1))
    assert slots.seat(1, 1) == [Seat(1, 4)]  # blocks for one
    assert slots.seat(1, 9) == [Seat(1, 5)]
    assert slots.head() is None
    assert slots.seats == [Seat(1, 3), Seat(2, 0), Seat(1, 4), Seat(1, 5)]  # oldest first


def test_a_returned_group_goes_first_and_keeps_its_other_samples():
    slots = DecodeSlots(2)
    slots.enqueue(1, None, range(3))
    slots.seat(1, 2)
    slots.enqueue(2, None, range(1))
    slots.release(Seat(1, 0))
    slots.release(Seat(1, 1))
    slots.enqueue(1, None, [0, 1], first=True)
    assert slots.head() == 1
    assert [seat.sample for seat in slots.seat(1, 2)] == [0, 1]


events = st.lists(
    st.one_of(
        st.tuples(st.just("enqueue"), st.sampled_from("abc"), st.integers(1, 7)),
        st.tuples(st.just("seat"), st.integers(0, 4)),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
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
            seated = slots.seat(head, details[0])
            assert len(seated) <= details[0]
            assert slots.seats[len(slots.seats) - len(seated) :] == seated
            waiting_owners = {owners[waiting] for waiting in slots.in_turn()}
            if seated and len(waiting_owners) > 1:
                assert owners[slots.head()] != owners[head]
        elif event == "release" and details[0] < len(slots.seats):
            seat = slots.seats[details[0]]
            rows[seat.job_id].discard(seat.sample)
            slots.release(seat)
        elif event == "remove":
            decoding = slots.seats_of(details[0])
            assert slots.remove(details[0]) == decoding
            rows.pop(details[0], None)
        live = [(seat.job_id, seat.sample) for seat in slots.seats]
        assert len(live) == len(set(live)) <= limit
        assert len(slots.seats) + slots.num_waiting == sum(len(samples) for samples in rows.values())
        assert all(sample in rows[job_id] for job_id, sample in live)
        waiting = set(slots.in_turn())
        assert waiting | {job_id for job_id, _ in live} == {job_id for job_id, left in rows.items() if left}
