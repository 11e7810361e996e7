"""Attention of packed rows against a dense masked softmax in float64: values, gradients, what is in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.jaxprs import shapes
from tx.layers import blockwise
from tx.layers.blockwise import LONG, LONG_LOOP_BLOCK, LOOP_BLOCK, QUERY_BLOCK, SHORT, packed_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def starts_of(rows: list[list[int]], seq: int) -> np.ndarray:
    """``starts`` of rows of datums of these lengths; each position of padding stands alone."""
    starts = np.tile(np.arange(seq, dtype=np.int32), (len(rows), 1))
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            starts[row, begin : begin + length] = begin
            begin += length
    return starts


def draw(rows: int, seq: int, heads: int = HEADS, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and what comes back to the output; scores large enough for a softmax with a peak."""
    rng = np.random.default_rng(seed)
    sizes = (heads, KV_HEADS, KV_HEADS, heads)
    q, k, v, dy = (rng.normal(size=(rows, seq, size, HEAD_DIM)).astype(np.float32) for size in sizes)
    return 2 * q, k, v, dy


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The output, and gradients of ``sum(y * dy)`` for q, k and v, datum by datum."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    group = q.shape[2] // k.shape[2]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    at = np.arange(q.shape[1])
    for row, head in np.ndindex(q.shape[0], q.shape[2]):
        kv = head // group
        seen = (at[:, None] >= at) & (at >= starts[row][:, None])
        scores = np.where(seen, q[row, :, head] @ k[row, :, kv].T / np.sqrt(HEAD_DIM), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row, :, head] = weights @ v[row, :, kv]
        dweights = dy[row, :, head] @ v[row, :, kv].T
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(HEAD_DIM)
        dv[row, :, kv] += weights.T @ dy[row, :, head]
        dq[row, :, head] = dscores @ k[row, :, kv]
        dk[row, :, kv] += dscores.T @ q[row, :, head]
    return out, dq, dk, dv


@jax.jit
def run(q, k, v, dy, starts):
    out, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, starts), q, k, v)
    return out, *pull(dy)


CASES = {
    # name: (positions of the row, lengths of the datums of each row)
    "a few positions": (5, [[5], [2, 3]]),
    "one block and a bit": (QUERY_BLOCK + 9, [[QUERY_BLOCK + 9], [60, 70]]),
    "the longest that is unrolled": (SHORT, [[500], [128, 128, 129]]),
    "the shortest in loops": (SHORT + 1, [[SHORT + 1], [64, 65, 63, 300]]),
    "many short datums": (SHORT + 128, [[7] * 90, [64] * 10]),
    "a long datum and short ones": (SHORT + 200, [[600, 3, 20], []]),
    "larger blocks": (LONG + 150, [[900, 256, 18], [300, 300]]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_dense_softmax(name: str):
    seq, rows = CASES[name]
    arrays, starts = draw(len(rows), seq), starts_of(rows, seq)
    wanted = reference(*arrays, starts)
    for mine, theirs in zip(run(*arrays, starts), wanted, strict=True):
        assert mine.dtype == jnp.float32
        assert np.max(np.abs(mine - theirs)) <= 1e-5 * np.max(np.abs(theirs))


@pytest.mark.parametrize("seq", [40, SHORT + 30])
@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS], ids=["one query per key", "three queries per key"])
def test_grouped_heads(seq: int, heads: int):
    arrays, starts = draw(1, seq, heads), starts_of([[seq - 20, 15]], seq)
    for mine, theirs in zip(run(*arrays, starts), reference(*arrays, starts), strict=True):
        assert np.max(np.abs(mine - theirs)) <= 1e-5 * np.max(np.abs(theirs))


@pytest.mark.parametrize("seq", [40, SHORT + 30])
def test_a_neighbour_changes_nothing(seq: int):
    """A datum's output and gradients are the same bits whatever the other datum of its row holds."""
    (q, k, v, dy), starts = draw(1, seq), starts_of([[seq - 20, 20]], seq)
    clean = run(q, k, v, dy, starts)
    for x in (q, k, v, dy):
        x[:, seq - 20 :] = 1e3
    for one, other in zip(clean, run(q, k, v, dy, starts), strict=True):
        assert np.array_equal(one[:, : seq - 20], other[:, : seq - 20])


@pytest.mark.parametrize("seq", [40, SHORT + 30])
def test_padding_is_finite_and_gives_nothing_back(seq: int):
    (q, k, v, dy), starts = draw(2, seq), starts_of([[17], []], seq)
    dy[0, 17:], dy[1] = 0, 0
    out, *gradients = run(q, k, v, dy, starts)
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert not gradient[0, 17:].any()
        assert not gradient[1].any()


@pytest.mark.parametrize("seq", [200, SHORT + 64])
def test_bfloat16_sums_in_float32(seq: int):
    """Equal queries and keys: each position's output is the mean of 200 and more values, to bfloat16's own rounding."""
    rng = np.random.default_rng(0)
    ones = jnp.ones((1, seq, 1, HEAD_DIM), jnp.bfloat16)
    v = jnp.asarray(rng.normal(1.0, 0.1, (1, seq, 1, HEAD_DIM)), jnp.bfloat16)
    out = packed_attention(ones, ones, v, jnp.zeros((1, seq), jnp.int32))
    assert out.dtype == jnp.bfloat16
    wanted = np.asarray(v[0, :, 0], np.float64).mean(0)
    assert np.max(np.abs(np.asarray(out[0, -1, 0], np.float64) - wanted)) <= 2**-8 * 1.5


@pytest.mark.parametrize("seq", [SHORT, 8192])
def test_memory_grows_with_the_row_not_with_its_square(seq: int):
    """Forward and backward: nothing holds the scores of a long row; a short row's are those of a block of queries."""
    arrays = [jnp.zeros((1, seq, heads, HEAD_DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    largest = max(int(np.prod(shape)) for shape in shapes(run, *arrays, jnp.zeros((1, seq), jnp.int32)))
    linear = 2 * seq * HEADS * HEAD_DIM
    assert largest <= max(linear, HEADS * QUERY_BLOCK * seq if seq <= SHORT else 0)
    assert largest < HEADS * seq * seq


@pytest.mark.parametrize(("block", "blocks"), [(LOOP_BLOCK, 7), (LONG_LOOP_BLOCK, 16)])
def test_blocks_that_no_query_sees_are_not_visited(monkeypatch: pytest.MonkeyPatch, block: int, blocks: int):
    """A row of datums as long as a block costs its diagonal: of 16 blocks, 16 pairs and not 136."""
    pairs: list[object] = []
    plain = blockwise._scores

    def counted(queries: jax.Array, keys: jax.Array) -> jax.Array:
        jax.debug.callback(pairs.append, queries[0, 0, 0, 0])
        return plain(queries, keys)

    monkeypatch.setattr(blockwise, "_scores", counted)
    seq = blocks * block
    q, k, v, _ = map(jnp.asarray, draw(1, seq))
    counts = []
    for starts in (starts_of([[block] * blocks], seq), np.zeros((1, seq), np.int32)):
        pairs.clear()
        jax.block_until_ready(packed_attention(q, k, v, jnp.asarray(starts)))
        jax.effects_barrier()
        counts.append(len(pairs))
    assert counts == [blocks, blocks * (blocks + 1) // 2]
