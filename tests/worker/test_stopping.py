"""``tx.worker.stopping`` against its definition, with vocabularies whose tokens are arbitrary pieces of UTF-8.

And with the two kinds of decoder that models come with: byte-level ones show a cut character as one replacement
character; byte-fallback ones show every byte of a run as one, as long as the run isn't valid as a whole.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.support.tiny_models import TOKENIZER
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


def row(stop_ids=(), strings=(), limit=1000, text_of=detokenize):
    return RowStop(stop_ids, strings, limit, text_of)


def end_by_definition(tokens, stop_ids, strings, limit, text_of):
    """The first token at which the text so far has a stop string, or that is a stop token or the last."""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count]) if strings else ""
        if tokens[count - 1] in stop_ids or any(string in text for string in strings):
            return tokens[:count], "stop"
        if count == limit:
            return tokens[:count], "length"
    return tokens, None


def push_in_slices(stop, tokens, size):
    for start in range(0, len(tokens), size):
        assert stop.push(tokens[start : start + size]) <= size
    return stop.tokens, stop.reason


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
    strings=st.lists(
        st.sampled_from(["ab", "aa", "\n\n", "User:", "€", "b€a", ": \n", "\ufffd", "a\ufffd"]), max_size=3
    ),
    stop_ids=st.sets(st.integers(0, EOS), max_size=2),
    limit=st.integers(1, 50),
    slice_size=st.integers(1, 9),
)
def test_slices_give_the_definition(tokens, strings, stop_ids, limit, slice_size):
    found = push_in_slices(row(stop_ids, strings, limit), tokens, slice_size)
    assert found == end_by_definition(tokens, stop_ids, strings, limit, detokenize)


# ---- real decoders --------------------------------------------------------------------------------------------------

TEXT = "Größe: 漢字😀😎! Ünïcödé\n\nUser: naïve 🚀🚀 — end"


def byte_fallback():
    """A SentencePiece-like tokenizer: a few pieces of ASCII, and bytes for all the rest."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgilnrsuvU:!\n"]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, lambda text: tokenizer.encode(text.replace(" ", "▁")).ids


def byte_level():
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    return tokenizer, lambda text: tokenizer.encode(text).ids


@pytest.fixture(params=[byte_level, byte_fallback], ids=["byte level", "byte fallback"], scope="module")
def real(request):
    """Tokens to text, and text to tokens."""
    tokenizer, encode = request.param()
    return (lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=False)), encode


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("string", ["ö", "ße:", "漢", "字😀", "😀", "😎!", "\n\nUser:", "ï", "🚀🚀", "🚀 —", "— end"])
def test_every_stop_string_of_a_real_text_is_found_at_its_last_token(real, string, size):
    text_of, encode = real
    ids = encode(TEXT)
    tokens, reason = push_in_slices(row(strings=[string, "absent"], text_of=text_of), ids, size)
    assert reason == "stop"
    assert string in text_of(tokens)
    assert string not in text_of(tokens[:-1])
    assert len(tokens) == next(count for count in range(len(ids) + 1) if string in text_of(ids[:count]))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_stop_string_deep_inside_a_run_of_bytes(real, size):
    """A window that begins inside a character would make the whole run unreadable to a byte-fallback decoder."""
    text_of, encode = real
    for lead in range(20, 26):
        ids = encode("é" * (lead % 4) + "😀" * lead + "😎🚀" + "😀" * 5)
        tokens, reason = push_in_slices(row(strings=["😎🚀"], text_of=text_of), ids, size)
        assert reason == "stop"
        assert text_of(tokens).endswith("😀😎🚀")


def test_a_cut_character_behind_a_stop_string_hides_it_from_nobody(real):
    """One slice ends with the first byte of the next character: a byte-fallback decoder then can't read either."""
    text_of, encode = real
    ids = encode(TEXT)
    smile = next(count for count in range(len(ids)) if "😀" in text_of(ids[:count]))
    stop = row(strings=["😀"], text_of=text_of)
    assert stop.push(ids[: smile + 1]) == smile
    assert stop.reason == "stop"


@given(
    tokens=st.lists(st.integers(0, 255), max_size=40),
    strings=st.lists(st.sampled_from(["é", "ab", "\ufffd", "😀", " a"]), min_size=1, max_size=2),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_where_slices_end_does_not_matter_even_to_garbage(real, tokens, strings, sizes):
    text_of, _ = real
    ends = [push_in_slices(row(strings=strings, text_of=text_of), tokens, size) for size in sizes]
    assert ends[0] == ends[1]
