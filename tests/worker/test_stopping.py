"""``tx.worker.stopping`` against its definition, with a byte-level vocabulary: tokens are arbitrary pieces of UTF-8."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx.worker.stopping import RowStop

PIECES = [
    b"a",
    b"b",
    b"ab",
    b"\n",
    b"\n\nUser",
    b":",
    b"User:",
    b" ",
    b"",
    b"\xe2",
    b"\x82\xac",
    b"\xac",
    b"\x82",
    b"ba\n",
]
EOS = len(PIECES)


def detokenize(ids):
    return b"".join(PIECES[token] if token < len(PIECES) else b"<eos>" for token in ids).decode("utf-8", "replace")


def row(stop_ids=(), strings=(), limit=1000):
    return RowStop(stop_ids, strings, limit, detokenize)


def ids(*pieces):
    return [PIECES.index(piece) for piece in pieces]


def test_a_stop_token_is_kept_once_and_the_overrun_dropped():
    stop = row(stop_ids={EOS})
    assert stop.push([0, 1]) == 2
    assert stop.reason is None
    assert stop.push([0, EOS, EOS, 1]) == 2
    assert stop.tokens == [0, 1, 0, EOS]
    assert stop.reason == "stop"
    assert stop.push([0, 1]) == 0


def test_length():
    stop = row(limit=3)
    assert stop.push([0, 0]) == 2
    assert stop.push([1, 1, 1]) == 1
    assert (stop.tokens, stop.reason) == ([0, 0, 1], "length")


def test_a_stop_token_at_the_limit_is_a_stop():
    stop = row(stop_ids={1}, limit=2)
    assert stop.push([0, 1, 0]) == 2
    assert stop.reason == "stop"


def test_a_stop_token_beyond_the_limit_is_not():
    stop = row(stop_ids={1}, limit=2)
    assert stop.push([0, 0, 1]) == 2
    assert stop.reason == "length"


def test_a_stop_string_across_tokens_and_slices():
    stop = row(strings=["\n\nUser:"])
    assert stop.push(ids(b"a", b"ba\n", b"\n")) == 3
    assert stop.push(ids(b"User:", b"a", b"a")) == 1
    assert stop.reason == "stop"
    assert detokenize(stop.tokens) == "aba\n\nUser:"


def test_a_stop_string_inside_one_token():
    stop = row(strings=["ser"])
    assert stop.push(ids(b"a", b"\n\nUser", b":")) == 2


def test_a_stop_string_of_several_bytes_per_character():
    stop = row(strings=["€b"])
    assert stop.push(ids(b"a", b"\xe2")) == 2
    assert stop.push(ids(b"\x82", b"\xac")) == 2
    assert stop.reason is None
    assert stop.push(ids(b"b", b"b")) == 1
    assert stop.reason == "stop"


def test_eos_stops_although_a_string_is_set():
    stop = row(stop_ids={EOS}, strings=["User:"])
    assert stop.push([*ids(b"a"), EOS, *ids(b"User:")]) == 2
    assert stop.reason == "stop"


def test_no_stops_at_all():
    stop = row(limit=6)
    assert stop.push([EOS] * 8) == 6
    assert stop.reason == "length"


@pytest.mark.parametrize("slice_size", [1, 3, 8])
def test_a_long_row_with_a_late_stop(slice_size):
    stop = row(strings=["\n\nUser:"], limit=5000)
    tokens = ids(*[b"a", b" ", b"\n"] * 400, b"\n", b"User:", b"a")
    for start in range(0, len(tokens), slice_size):
        stop.push(tokens[start : start + slice_size])
    assert len(stop.tokens) == 1202
    assert stop.reason == "stop"


@given(
    tokens=st.lists(st.integers(0, EOS), max_size=60),
    strings=st.lists(st.sampled_from(["ab", "aa", "\n\n", "User:", "€", "b€a", ": \n"]), max_size=3),
    stop_ids=st.sets(st.integers(0, EOS), max_size=2),
    limit=st.integers(1, 50),
    slice_size=st.integers(1, 9),
)
def test_slices_give_the_definition(tokens, strings, stop_ids, limit, slice_size):
    stop = row(stop_ids, strings, limit)
    for start in range(0, len(tokens), slice_size):
        kept = stop.push(tokens[start : start + slice_size])
        assert kept <= slice_size
    end, reason = len(tokens), None
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] in stop_ids or any(text in detokenize(tokens[:count]) for text in strings):
            end, reason = count, "stop"
            break
        if count == limit:
            end, reason = count, "length"
            break
    assert stop.tokens == tokens[:end]
    assert stop.reason == reason
