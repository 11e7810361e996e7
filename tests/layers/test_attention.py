"""Attention kernels against a plain float64 softmax: blocks, one query, chunks against a cache, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx.layers import attention

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


@pytest.mark.parametrize("block", [512, 8])
def test_causal(monkeypatch, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)  # 21 positions as one block, or as 8 + 8 + 5
    q, k, v = _draw(21, HEADS, 0), _draw(21, KV_HEADS, 1), _draw(21, KV_HEADS, 2)
    expected = _reference(q, k, v, np.broadcast_to(np.arange(21), (ROWS, 21)))
    assert np.max(np.abs(attention.causal_attention(q, k, v) - expected)) <= 1e-5


def test_blocks_have_the_same_gradient(monkeypatch):
    q, k, v = _draw(21, HEADS, 0), _draw(21, KV_HEADS, 1), _draw(21, KV_HEADS, 2)

    def gradient():
        return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attention.causal_attention(q, k, v))), (0, 1, 2))(q, k, v)

    whole = gradient()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    for one, other in zip(whole, gradient(), strict=True):
        assert np.max(np.abs(one - other)) <= 1e-5


@pytest.mark.parametrize("seq", [1, 3])
def test_against_a_cache(seq):
    """A query sees the cache up to its own position; what lies after is noise."""
    q, k, v = _draw(seq, HEADS, 0), _draw(16, KV_HEADS, 1), _draw(16, KV_HEADS, 2)
    positions = np.array([[4], [11]]) + np.arange(seq)
    got = attention.cached_attention(q, k, v, jnp.asarray(positions))
    assert np.max(np.abs(got - _reference(q, k, v, positions))) <= 1e-5


def test_a_row_without_a_request_stays_finite():
    q, k, v = _draw(1, HEADS, 0), jnp.zeros((ROWS, 4, KV_HEADS, HEAD_DIM)), jnp.zeros((ROWS, 4, KV_HEADS, HEAD_DIM))
    assert np.isfinite(attention.cached_attention(q, k, v, jnp.full((ROWS, 1), 4))).all()


def test_one_query_rounds_like_many_in_bfloat16():
    """Decode and training differ by the order of sums alone, not by what is rounded."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (_draw(1, HEADS, 0), _draw(16, KV_HEADS, 1), _draw(16, KV_HEADS, 2)))
    mask = jnp.ones((ROWS, 1, 16), bool)
    one = np.asarray(attention._attend_one(q, k, v, mask), np.float32)
    many = np.asarray(attention._attend(q, k, v, mask), np.float32)
    assert np.max(np.abs(one - many)) <= 2**-7 * np.max(np.abs(many))
