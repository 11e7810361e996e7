"""Attention kernels against a plain float64 softmax: prompts, packed rows, decode, pieces of a prompt."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tx.layers import attention, kv_cache
from tx.layers.attention import AttentionShape, Packed
from tx.layers.kv_cache import BLOCK, Decoding, LayerBlocks
from tx.layers.rotary import RopeConfig, rotary_tables

ROWS, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 2, 8


def _draw(seq: int, heads: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, seq, heads, HEAD_DIM)), jnp.float32)


def _reference(q, k, v, last):
    """``last[row, i]``: the last key position that query i of the row sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("rqhd,rshd->rhqs", q, k) / np.sqrt(HEAD_DIM)
    scores = np.where(np.arange(k.shape[1]) <= np.asarray(last)[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("rhqs,rshd->rqhd", weights / weights.sum(-1, keepdims=True), v)


def test_causal():
    """In one block of queries or several, in loops or not: ``tx.layers.blockwise`` has its own tests."""
    for seq in (21, 140, 530):
        q, k, v = _draw(seq, HEADS, 0), _draw(seq, KV_HEADS, 1), _draw(seq, KV_HEADS, 2)
        expected = _reference(q, k, v, np.broadcast_to(np.arange(seq), (ROWS, seq)))
        assert np.max(np.abs(attention.causal_attention(q, k, v) - expected)) <= 1e-5


@pytest.mark.parametrize("kv_axis", ["kv_heads", None])
def test_a_packed_row_equals_its_datums_alone(kv_axis):
    """Through projections, head norms and rotation: the module with ``Packed`` against a row per datum."""
    shape = AttentionShape(16, HEADS, KV_HEADS, HEAD_DIM, True, 1e-6, "heads", kv_axis)
    layer = attention.Attention(shape, None)
    rng = np.random.default_rng(0)
    for _, weight in nnx.iter_graph(layer):
        if isinstance(weight, nnx.Param):
            weight.set_value(jnp.asarray(rng.normal(0, 0.3, weight.get_value().shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(1, 12, 16)), jnp.float32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0, 0]])
    starts = np.array([[0, 0, 0, 0, 0, 5, 5, 5, 8, 9, 10, 11]])
    rope = RopeConfig(10_000.0)

    @jax.jit
    def run(x, positions, place):
        return layer(x, *rotary_tables(positions, rope, HEAD_DIM), positions, {}, None, None, place)[0]

    packed = run(x, jnp.asarray(positions), Packed(jnp.asarray(starts)))
    for begin, end in ((0, 5), (5, 8)):
        alone = run(x[:, begin:end], jnp.asarray(positions[:, begin:end]), None)
        assert np.max(np.abs(packed[:, begin:end] - alone)) <= 1e-6


LENGTHS = (70, 3, 130)
"""Positions that three rows know, the query's own included: 2, 1 and 3 blocks of 64."""


def _pool(seed: int, fill: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray], LayerBlocks, Decoding]:
    """Keys and values per row, and the same in shuffled blocks among free ones; rubbish where nobody looks."""
    rng = np.random.default_rng(seed)
    keys, values = ([rng.normal(size=(n, KV_HEADS, HEAD_DIM)).astype(np.float32) for n in LENGTHS] for _ in range(2))
    owner, start = np.full(8, 3), np.zeros(8, int)
    pool = [np.full((8, KV_HEADS, HEAD_DIM, BLOCK), fill, np.float32), np.full((8, KV_HEADS, BLOCK, HEAD_DIM), fill)]
    numbers = iter(rng.permutation(8))
    for row, length in enumerate(LENGTHS):
        for at in range(0, length, BLOCK):
            block, part = next(numbers), slice(at, at + BLOCK)
            owner[block], start[block] = row, at
            size = len(keys[row][part])
            pool[0][block, :, :, :size] = keys[row][part].transpose(1, 2, 0)
            pool[1][block, :, :size] = values[row][part].transpose(1, 0, 2)
    blocks = LayerBlocks(jnp.asarray(pool[0]), jnp.asarray(pool[1], jnp.float32))
    return keys, values, blocks, Decoding(jnp.asarray(owner), jnp.asarray(start), jnp.zeros(3, jnp.int32))


def _queries(rows: int, seed: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 1, HEADS, HEAD_DIM)), jnp.float32)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["sums by segment", "sums as a product"])
def test_decode_against_blocks(on_gpu):
    """Each row sees its own blocks, wherever they are, up to its position; a fourth row has none and stays finite."""
    keys, values, blocks, place = _pool(1, fill=3.0)
    place = replace(place, owner=jnp.where(place.owner == 3, 4, place.owner))
    q = _queries(4)
    positions = jnp.asarray([*(length - 1 for length in LENGTHS), 0])[:, None]
    got = attention.decode_attention(q, blocks, place, positions, on_gpu=on_gpu)
    for row, length in enumerate(LENGTHS):
        expected = _reference(q[row : row + 1], keys[row][None], values[row][None], [[length - 1]])
        assert np.max(np.abs(got[row] - expected[0])) <= 1e-5
    assert not got[3].any()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["sums by segment", "sums as a product"])
def test_c10_a_row_that_overflows_reaches_no_other(on_gpu):
    _, _, blocks, place = _pool(1)
    q = _queries(3)
    positions = jnp.asarray([length - 1 for length in LENGTHS])[:, None]
    clean = attention.decode_attention(q, blocks, place, positions, on_gpu=on_gpu)
    mine = (place.owner == 0)[:, None, None, None]
    for broken in (
        LayerBlocks(jnp.where(mine, jnp.nan, blocks.k), blocks.v),
        LayerBlocks(blocks.k, blocks.v + jnp.where(mine, jnp.inf, 0.0)),
    ):
        got = attention.decode_attention(q, broken, place, positions, on_gpu=on_gpu)
        assert not np.isfinite(got[0]).any()
        assert (got[1:] == clean[1:]).all()


@pytest.mark.parametrize("width", [8, 2], ids=["in one piece", "in pieces that overlap"])
@pytest.mark.parametrize("length", [0, 64, 192, 320])
def test_a_piece_of_a_prompt_behind_earlier_blocks(monkeypatch, length, width):
    monkeypatch.setattr(attention, "PRIOR_PIECE", width)
    seq, room = 10, 5 * BLOCK
    q, k, v = _draw(seq, HEADS, 0)[:1], _draw(length + seq, KV_HEADS, 1)[:1], _draw(length + seq, KV_HEADS, 2)[:1]
    earlier = [jnp.pad(x[:, :length], ((0, 0), (0, room - length), (0, 0), (0, 0)), constant_values=7) for x in (k, v)]
    got = attention.continued_attention(
        q, k[:, length:], v[:, length:], kv_cache.in_blocks(*earlier), jnp.int32(length)
    )
    expected = _reference(q, k, v, length + np.arange(seq)[None])
    assert np.max(np.abs(got - expected)) <= 1e-5


def test_decode_rounds_like_prefill_in_bfloat16():
    """Decode and training differ by the order of sums alone, not by what is rounded."""
    keys, values, blocks, place = _pool(1)
    blocks = jax.tree.map(lambda x: x.astype(jnp.bfloat16), blocks)
    q = _queries(3).astype(jnp.bfloat16)
    positions = jnp.asarray([length - 1 for length in LENGTHS])[:, None]
    got = np.asarray(attention.decode_attention(q, blocks, place, positions), np.float32)
    for row, length in enumerate(LENGTHS):
        k, v = (jnp.asarray(x[row][None], jnp.bfloat16) for x in (keys, values))
        queries = jnp.zeros((1, length, HEADS, HEAD_DIM), jnp.bfloat16).at[:, -1].set(q[row])
        many = np.asarray(attention.causal_attention(queries, k, v)[:, -1:], np.float32)
        assert np.max(np.abs(got[row] - many[0])) <= 2**-7 * np.max(np.abs(many))
